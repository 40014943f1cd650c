//! What a Noise handshake is made of, as `snow` wants it: X25519, SHA-256 and AES-256-GCM by `aws-lc-rs`, and random bytes from the caller.
//!
//! Knows how the Noise Protocol Framework (revision 34, section 12) lays out nonces; does not know patterns, keys' owners or frames.
//! One library does all cryptography then, and a handshake costs half of what it does with `snow`'s own (docs/decisions/0011-keys.md).

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::agreement::{PrivateKey, UnparsedPublicKey, X25519, agree};
use aws_lc_rs::digest::{Context, SHA256};
use snow::Error;
use snow::params::{CipherChoice, DHChoice, HashChoice};
use snow::resolvers::CryptoResolver;
use snow::types::{Cipher, Dh, Hash, Random};

use crate::identity::Entropy;
use crate::session_keys::{Secret, TAG_BYTES};

const KEY_BYTES: usize = 32;

/// The primitives of `Noise_IKpsk2_25519_AESGCM_SHA256`; nothing for any other name.
pub(crate) struct Primitives(pub Entropy);

impl CryptoResolver for Primitives {
    fn resolve_rng(&self) -> Option<Box<dyn Random>> {
        Some(Box::new(Numbers(self.0.clone())))
    }

    fn resolve_dh(&self, choice: &DHChoice) -> Option<Box<dyn Dh>> {
        (*choice == DHChoice::Curve25519).then(|| Box::new(Place(None)) as Box<dyn Dh>)
    }

    fn resolve_hash(&self, choice: &HashChoice) -> Option<Box<dyn Hash>> {
        (*choice == HashChoice::SHA256).then(|| Box::new(Sha256(Context::new(&SHA256))) as Box<dyn Hash>)
    }

    fn resolve_cipher(&self, choice: &CipherChoice) -> Option<Box<dyn Cipher>> {
        let made = || Box::new(AesGcm(aes_key(&[0; KEY_BYTES]))) as Box<dyn Cipher>;
        (*choice == CipherChoice::AESGCM).then(made)
    }
}

struct Numbers(Entropy);

impl Random for Numbers {
    fn try_fill_bytes(&mut self, dest: &mut [u8]) -> Result<(), Error> {
        (self.0)(dest);
        Ok(())
    }
}

/// A pair of X25519 keys (RFC 7748).
pub(crate) struct KeyPair {
    secret: Secret,
    private: PrivateKey,
    public: [u8; KEY_BYTES],
}

impl KeyPair {
    /// The pair of a private key, which is any 32 bytes.
    pub(crate) fn of(secret: Secret) -> KeyPair {
        let private = PrivateKey::from_private_key(&X25519, &secret[..]).expect("any 32 bytes are a key");
        let public = private.compute_public_key().expect("a public key follows from it");
        let public = public.as_ref().try_into().expect("X25519 has keys of 32 bytes");
        KeyPair { secret, private, public }
    }

    /// The key that others may know.
    pub(crate) fn public(&self) -> [u8; KEY_BYTES] {
        self.public
    }
}

/// Where `snow` puts a pair: it asks for the place before it has the key.
struct Place(Option<KeyPair>);

impl Place {
    fn pair(&self) -> &KeyPair {
        self.0.as_ref().expect("snow sets or makes a key before it uses one")
    }
}

impl Dh for Place {
    fn name(&self) -> &'static str {
        "25519"
    }

    fn pub_len(&self) -> usize {
        KEY_BYTES
    }

    fn priv_len(&self) -> usize {
        KEY_BYTES
    }

    fn set(&mut self, privkey: &[u8]) {
        self.0 = Some(KeyPair::of(Secret::new(privkey.try_into().expect("X25519 has keys of 32 bytes"))));
    }

    fn generate(&mut self, rng: &mut dyn Random) -> Result<(), Error> {
        let mut secret = Secret::default();
        rng.try_fill_bytes(&mut secret[..])?;
        self.0 = Some(KeyPair::of(secret));
        Ok(())
    }

    fn pubkey(&self) -> &[u8] {
        &self.pair().public
    }

    fn privkey(&self) -> &[u8] {
        &self.pair().secret[..]
    }

    /// Fails for a public key of low order, with which every shared secret is zero.
    fn dh(&self, pubkey: &[u8], out: &mut [u8]) -> Result<(), Error> {
        // snow keeps public keys in room for the longest of all curves.
        let other = UnparsedPublicKey::new(&X25519, pubkey.get(..KEY_BYTES).ok_or(Error::Dh)?);
        agree(&self.pair().private, other, Error::Dh, |shared| {
            out.get_mut(..shared.len()).ok_or(Error::Dh)?.copy_from_slice(shared);
            Ok(())
        })
    }
}

struct Sha256(Context);

impl Hash for Sha256 {
    fn name(&self) -> &'static str {
        "SHA256"
    }

    fn block_len(&self) -> usize {
        64
    }

    fn hash_len(&self) -> usize {
        32
    }

    fn reset(&mut self) {
        self.0 = Context::new(&SHA256);
    }

    fn input(&mut self, data: &[u8]) {
        self.0.update(data);
    }

    fn result(&mut self, out: &mut [u8]) {
        let ended = std::mem::replace(&mut self.0, Context::new(&SHA256)).finish();
        out[..ended.as_ref().len()].copy_from_slice(ended.as_ref());
    }
}

struct AesGcm(LessSafeKey);

fn aes_key(key: &[u8; KEY_BYTES]) -> LessSafeKey {
    LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).expect("32 bytes are a key of AES-256"))
}

/// Four zero bytes and the number, most significant byte first.
fn nonce(number: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&number.to_be_bytes());
    Nonce::assume_unique_for_key(bytes)
}

impl Cipher for AesGcm {
    fn name(&self) -> &'static str {
        "AESGCM"
    }

    fn set(&mut self, key: &[u8; KEY_BYTES]) {
        self.0 = aes_key(key);
    }

    fn encrypt(&self, number: u64, authtext: &[u8], plaintext: &[u8], out: &mut [u8]) -> usize {
        let (text, rest) = out.split_at_mut(plaintext.len());
        text.copy_from_slice(plaintext);
        let sealed = self.0.seal_in_place_separate_tag(nonce(number), Aad::from(authtext), text);
        rest[..TAG_BYTES].copy_from_slice(sealed.expect("a handshake message is short").as_ref());
        plaintext.len() + TAG_BYTES
    }

    fn decrypt(
        &self,
        number: u64,
        authtext: &[u8],
        ciphertext: &[u8],
        out: &mut [u8],
    ) -> Result<usize, Error> {
        let bytes = ciphertext.len().checked_sub(TAG_BYTES).ok_or(Error::Decrypt)?;
        let (text, tag) = ciphertext.split_at(bytes);
        let out = out.get_mut(..bytes).ok_or(Error::Decrypt)?;
        let opened = self.0.open_separate_gather(nonce(number), Aad::from(authtext), text, tag, out);
        opened.map(|()| bytes).map_err(|_| Error::Decrypt)
    }
}
