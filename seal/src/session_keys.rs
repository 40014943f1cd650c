//! The keys of a session: AES-256-GCM (NIST SP 800-38D), another key in each direction, and a new one every 2^23 frames.
//!
//! Knows packet numbers; does not know how the first secrets were agreed on, nor whether a frame was seen before: that is the core's window.
//!
//! A nonce is a salt, which belongs to the key, and the packet number, which is never used again. The key of phase `n + 1` comes from a
//! secret from which that of phase `n` cannot be reckoned back (HKDF, RFC 5869), so a key that leaks opens nothing older.

use std::sync::Arc;

use aws_lc_rs::aead::{self, AES_256_GCM, Aad, LessSafeKey, UnboundKey};
use aws_lc_rs::hkdf::{self, HKDF_SHA256, Prk};
use cirro_protocol::types::ETHERNET_BYTES;
use cirro_protocol::wire::header::CLEAR_BYTES;
use cirro_protocol::wire::{Frame, Header, Mode};
use zeroize::Zeroizing;

use crate::Mismatch;

/// Frames under one key: 2 to the power of this. At 8 KiB a frame they are 2^32 blocks, far below what AES-GCM allows for one key.
pub const PHASE_BITS: u32 = 23;
/// Bytes of the tag.
pub(crate) const TAG_BYTES: usize = Mode::Aead.tag_bytes();
/// Where what is encrypted begins.
const CIPHER_START: usize = ETHERNET_BYTES + CLEAR_BYTES;

/// A secret that both ends know and nobody else.
pub type Secret = Zeroizing<[u8; 32]>;

/// What a frame was sealed with; the key is named by what cannot be reckoned back to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Nonce {
    /// Differs from key to key.
    pub key: [u8; 16],
    /// The key's salt.
    pub salt: [u8; 4],
    /// The packet number.
    pub pn: u64,
}

/// Is shown every nonce that is used.
pub type Witness = Arc<dyn Fn(Nonce) + Send + Sync>;

/// The keys of one end of a session.
pub struct SessionKeys {
    sending: Direction,
    receiving: Direction,
    last_sent: u64,
    witness: Option<Witness>,
}

impl std::fmt::Debug for SessionKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "SessionKeys(sending phase {}, receiving phase {})",
            self.sending.phase, self.receiving.phase
        )
    }
}

impl SessionKeys {
    /// Keys from the secrets of both directions, as this end sees them. They change every 2^`phase_bits` frames, at both ends.
    pub fn new(
        sending: &Secret,
        receiving: &Secret,
        phase_bits: u32,
        witness: Option<Witness>,
    ) -> SessionKeys {
        SessionKeys {
            sending: Direction::new(sending, phase_bits),
            receiving: Direction::new(receiving, phase_bits),
            last_sent: 0,
            witness,
        }
    }

    /// Seals a frame in place: `frame` is all of it but the tag, which is appended. The key phase is written into its header.
    ///
    /// # Panics
    /// If `pn` is not larger than that of the frame before: the same nonce would be used twice, which gives both texts away.
    pub fn seal(&mut self, pn: u64, frame: &mut Vec<u8>) {
        assert!(pn > self.last_sent, "packet number {pn} comes after {}", self.last_sent);
        self.last_sent = pn;
        let key = self.sending.for_sending(pn);
        if let Some(witness) = &self.witness {
            witness(Nonce { key: key.name, salt: key.salt, pn });
        }
        let (clear, text) = frame.split_at_mut(CIPHER_START);
        clear[ETHERNET_BYTES] |= (key.phase as u8 & 0b11) << 2;
        let tag = key
            .aead
            .seal_in_place_separate_tag(key.nonce(pn), Aad::from(&clear[ETHERNET_BYTES..]), text)
            .expect("a frame is shorter than AES-GCM's limit");
        frame.extend_from_slice(tag.as_ref());
    }

    /// Decrypts a whole frame into `plain`, which grows as needed, and takes it apart.
    ///
    /// # Errors
    /// [`Mismatch::Mode`], [`Mismatch::Phase`], [`Mismatch::Tag`]; [`Mismatch::Layout`] says that the peer, who has the key, writes nonsense.
    pub fn open<'a>(
        &mut self,
        header: &Header,
        bytes: &[u8],
        plain: &'a mut Vec<u8>,
    ) -> Result<Frame<'a>, Mismatch> {
        if header.mode != Mode::Aead {
            return Err(Mismatch::Mode);
        }
        let len = bytes.len();
        if len < CIPHER_START + TAG_BYTES {
            return Err(Mismatch::Layout);
        }
        if plain.len() < len {
            plain.resize(len, 0);
        }
        let key = self.receiving.for_receiving(header.pn)?;
        if header.key_phase != key.phase as u8 & 0b11 {
            return Err(Mismatch::Phase);
        }
        let (clear, rest) = bytes.split_at(CIPHER_START);
        let (cipher, tag) = rest.split_at(rest.len() - TAG_BYTES);
        let text = &mut plain[CIPHER_START..len - TAG_BYTES];
        key.aead
            .open_separate_gather(
                key.nonce(header.pn),
                Aad::from(&clear[ETHERNET_BYTES..]),
                cipher,
                tag,
                text,
            )
            .map_err(|_| Mismatch::Tag)?;
        self.receiving.opened(header.pn);
        plain[..CIPHER_START].copy_from_slice(clear);
        Frame::parse(&plain[..len]).map_err(|_| Mismatch::Layout)
    }
}

/// The keys of one direction, around the phase at hand.
struct Direction {
    phase_bits: u32,
    phase: u64,
    /// The secret of the phase after `next`, or after the present one while there is no `next`.
    secret: Prk,
    previous: Option<PhaseKey>,
    current: PhaseKey,
    next: Option<PhaseKey>,
}

struct PhaseKey {
    phase: u64,
    aead: LessSafeKey,
    salt: [u8; 4],
    name: [u8; 16],
}

impl PhaseKey {
    fn nonce(&self, pn: u64) -> aead::Nonce {
        let mut nonce = [0; 12];
        nonce[..4].copy_from_slice(&self.salt);
        nonce[4..].copy_from_slice(&pn.to_be_bytes());
        aead::Nonce::assume_unique_for_key(nonce)
    }
}

impl Direction {
    fn new(secret: &Secret, phase_bits: u32) -> Direction {
        let secret = Prk::new_less_safe(HKDF_SHA256, &secret[..]);
        let (current, secret) = derive(&secret, 0);
        Direction { phase_bits, phase: 0, secret, previous: None, current, next: None }
    }

    fn for_sending(&mut self, pn: u64) -> &PhaseKey {
        while self.phase < pn >> self.phase_bits {
            self.advance();
        }
        &self.current
    }

    /// The key of a received frame: of the phase at hand or one beside it; what is further away is nobody's.
    fn for_receiving(&mut self, pn: u64) -> Result<&PhaseKey, Mismatch> {
        let phase = pn >> self.phase_bits;
        if phase == self.phase {
            Ok(&self.current)
        } else if phase == self.phase + 1 {
            Ok(self.next())
        } else {
            self.previous.as_ref().filter(|key| key.phase == phase).ok_or(Mismatch::Phase)
        }
    }

    fn next(&mut self) -> &PhaseKey {
        let Direction { next, secret, phase, .. } = self;
        next.get_or_insert_with(|| {
            let (key, after) = derive(secret, *phase + 1);
            *secret = after;
            key
        })
    }

    /// A frame was opened: the sender has come to its phase.
    fn opened(&mut self, pn: u64) {
        if pn >> self.phase_bits > self.phase {
            self.advance();
        }
    }

    fn advance(&mut self) {
        self.next();
        if let Some(next) = self.next.take() {
            self.previous = Some(std::mem::replace(&mut self.current, next));
            self.phase += 1;
        }
    }
}

/// The key of `phase` from its secret, and the secret of the phase after it.
fn derive(secret: &Prk, phase: u64) -> (PhaseKey, Prk) {
    let (mut key, mut salt, mut next) = (Zeroizing::new([0; 32]), [0; 4], Zeroizing::new([0; 32]));
    expand(secret, b"cirro key", &mut key[..]);
    expand(secret, b"cirro salt", &mut salt);
    expand(secret, b"cirro next", &mut next[..]);
    // The same key has the same name, whoever derived it: it follows from the key, not from the secret.
    let mut name = [0; 16];
    expand(&Prk::new_less_safe(HKDF_SHA256, &key[..]), b"cirro name", &mut name);
    let aead = UnboundKey::new(&AES_256_GCM, &key[..]).expect("32 bytes are a key of AES-256");
    (PhaseKey { phase, aead: LessSafeKey::new(aead), salt, name }, Prk::new_less_safe(HKDF_SHA256, &next[..]))
}

fn expand(secret: &Prk, label: &[u8], out: &mut [u8]) {
    struct Bytes(usize);
    impl hkdf::KeyType for Bytes {
        fn len(&self) -> usize {
            self.0
        }
    }
    let filled = secret.expand(&[label], Bytes(out.len())).and_then(|material| material.fill(out));
    filled.expect("a few bytes are within what HKDF gives");
}
