//! Who a daemon is: its X25519 key pair, and the Noise handshakes that it makes with it.
//!
//! Knows the pattern (IKpsk2: the caller knows the other's key before, and both may share a secret beside); does not know frames.

use std::sync::Arc;

use cirro_protocol::types::PublicKey;
use snow::params::NoiseParams;
use snow::{Builder, HandshakeState};

use crate::primitives::{KeyPair, Primitives};
use crate::session_keys::{PHASE_BITS, Secret, SessionKeys, Witness};

const PATTERN: &str = "Noise_IKpsk2_25519_AESGCM_SHA256";
const PROLOGUE: &[u8] = b"cirrostratus 1";

/// Fills with random bytes that nobody can guess. A simulator gives one of its own, so that a run can be repeated.
pub type Entropy = Arc<dyn Fn(&mut [u8]) + Send + Sync>;

/// The operating system's.
pub fn os_entropy() -> Entropy {
    Arc::new(|bytes| aws_lc_rs::rand::fill(bytes).expect("the kernel gives random bytes"))
}

/// A key pair.
#[derive(Clone)]
pub struct Identity {
    private: Secret,
    public: PublicKey,
    entropy: Entropy,
    phase_bits: u32,
    witness: Option<Witness>,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Identity({})", self.public)
    }
}

impl Identity {
    /// The pair of a private key, 32 random bytes.
    pub fn new(private: Secret, entropy: Entropy) -> Identity {
        let public = public_of(&private);
        Identity { private, public, entropy, phase_bits: PHASE_BITS, witness: None }
    }

    /// Makes its sessions change keys every 2^`bits` frames, so that a short run sees it often. Both ends must do alike.
    pub fn with_phase_bits(self, bits: u32) -> Identity {
        Identity { phase_bits: bits, ..self }
    }

    /// Shows every nonce that its sessions seal with, so that a simulator sees that none is used twice.
    pub fn with_witness(self, witness: Witness) -> Identity {
        Identity { witness: Some(witness), ..self }
    }

    /// The keys of a session from what a handshake gave both ends.
    pub(crate) fn session_keys(&self, sending: [u8; 32], receiving: [u8; 32]) -> SessionKeys {
        let secrets = (Secret::new(sending), Secret::new(receiving));
        SessionKeys::new(&secrets.0, &secrets.1, self.phase_bits, self.witness.clone())
    }

    /// By which others know it.
    pub fn public(&self) -> PublicKey {
        self.public
    }

    pub(crate) fn fill(&self, bytes: &mut [u8]) {
        (self.entropy)(bytes);
    }

    /// A handshake that calls the owner of `node`.
    pub(crate) fn call(&self, node: &PublicKey, psk: &Secret) -> Result<HandshakeState, snow::Error> {
        let builder = self.builder()?.remote_public_key(&node.0)?.psk(2, psk)?;
        builder.build_initiator()
    }

    /// A handshake that answers; the secret shared with the caller is set when it is known who calls.
    pub(crate) fn answer(&self) -> Result<HandshakeState, snow::Error> {
        self.builder()?.psk(2, &[0; 32])?.build_responder()
    }

    fn builder(&self) -> Result<Builder<'_>, snow::Error> {
        let params: NoiseParams = PATTERN.parse()?;
        let resolver = Box::new(Primitives(Arc::clone(&self.entropy)));
        Builder::with_resolver(params, resolver).prologue(PROLOGUE)?.local_private_key(&self.private[..])
    }
}

/// The public key of a private one.
pub fn public_of(private: &Secret) -> PublicKey {
    PublicKey(KeyPair::of(private.clone()).public())
}

/// A new private key.
pub fn new_private(entropy: &Entropy) -> Secret {
    let mut private = Secret::default();
    entropy(&mut private[..]);
    private
}
