//! The two marks of a guarded LONG frame, and cookies: what makes a flood cheap to refuse before any key is agreed on.
//!
//! Knows bytes and hashes (HMAC-SHA256, RFC 2104, cut to 16 bytes). The first mark shows that the sender knows the node's public key; the
//! second, asked for under load, that it receives at the address it sends from. The idea is that of WireGuard (Donenfeld, NDSS 2017).

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest::{Context, SHA256};
use aws_lc_rs::hmac;
use cirro_protocol::types::{ETHERNET_BYTES, MacAddress, PublicKey};
use cirro_protocol::wire::guarded::{FIRST_MARK_AT, MARK_BYTES, SECOND_MARK_AT};

/// 16 bytes that stand for the text they were made of.
pub(crate) type Mark = [u8; MARK_BYTES];

/// Bytes of a cookie as COOKIE carries it: a nonce, the cookie, a tag.
pub(crate) const SEALED_COOKIE_BYTES: usize = 12 + MARK_BYTES + 16;

/// What everybody can make who knows a node's public key.
#[derive(Debug)]
pub(crate) struct Marker {
    first: hmac::Key,
    cookie: LessSafeKey,
}

impl Marker {
    pub(crate) fn new(node: &PublicKey) -> Marker {
        let cookie = UnboundKey::new(&AES_256_GCM, &hash(b"cirro cookie", &node.0));
        Marker {
            first: hmac::Key::new(hmac::HMAC_SHA256, &hash(b"cirro mark", &node.0)),
            cookie: LessSafeKey::new(cookie.expect("32 bytes are a key of AES-256")),
        }
    }

    /// Appends both marks to a frame; the second is zeroes without a cookie. Returns the first.
    pub(crate) fn mark(&self, frame: &mut Vec<u8>, cookie: Option<&Mark>) -> Mark {
        let first = short(&self.first, &[&frame[ETHERNET_BYTES..]]);
        frame.extend_from_slice(&first);
        let second = cookie.map_or([0; MARK_BYTES], |cookie| second_mark(cookie, &frame[ETHERNET_BYTES..]));
        frame.extend_from_slice(&second);
        first
    }

    /// True if the first mark of a whole frame is right.
    pub(crate) fn is_marked(&self, frame: &[u8]) -> bool {
        let expected = short(&self.first, &[&frame[ETHERNET_BYTES..FIRST_MARK_AT]]);
        verify_slices_are_equal(&expected, &frame[FIRST_MARK_AT..SECOND_MARK_AT]).is_ok()
    }

    /// A cookie for the sender of the frame with the mark `first`, as COOKIE carries it.
    pub(crate) fn seal_cookie(
        &self,
        nonce: [u8; 12],
        first: &Mark,
        cookie: &Mark,
    ) -> [u8; SEALED_COOKIE_BYTES] {
        let mut sealed = [0; SEALED_COOKIE_BYTES];
        sealed[..12].copy_from_slice(&nonce);
        sealed[12..28].copy_from_slice(cookie);
        let tag = self.cookie.seal_in_place_separate_tag(
            Nonce::assume_unique_for_key(nonce),
            Aad::from(first),
            &mut sealed[12..28],
        );
        sealed[28..].copy_from_slice(tag.expect("16 bytes can be sealed").as_ref());
        sealed
    }

    /// The cookie in a COOKIE's body, if it answers the frame with the mark `first`.
    pub(crate) fn open_cookie(&self, body: &[u8], first: &Mark) -> Option<Mark> {
        let (nonce, rest) = body.split_first_chunk::<12>()?;
        let mut text = *rest.first_chunk::<32>()?;
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let cookie = self.cookie.open_in_place(nonce, Aad::from(first), &mut text).ok()?;
        cookie.try_into().ok()
    }
}

/// True if the second mark of a whole frame shows `cookie`.
pub(crate) fn shows_cookie(frame: &[u8], cookie: &Mark) -> bool {
    let expected = second_mark(cookie, &frame[ETHERNET_BYTES..SECOND_MARK_AT]);
    verify_slices_are_equal(&expected, &frame[SECOND_MARK_AT..]).is_ok()
}

/// The cookie of an address under a secret of the node's.
pub(crate) fn cookie_of(secret: &[u8; 32], source: MacAddress) -> Mark {
    short(&hmac::Key::new(hmac::HMAC_SHA256, secret), &[&source.0])
}

fn second_mark(cookie: &Mark, covered: &[u8]) -> Mark {
    short(&hmac::Key::new(hmac::HMAC_SHA256, cookie), &[covered])
}

fn short(key: &hmac::Key, parts: &[&[u8]]) -> Mark {
    let mut context = hmac::Context::with_key(key);
    parts.iter().for_each(|part| context.update(part));
    *context.sign().as_ref().first_chunk().expect("SHA-256 gives 32 bytes")
}

pub(crate) fn hash(label: &[u8], text: &[u8]) -> [u8; 32] {
    let mut context = Context::new(&SHA256);
    context.update(label);
    context.update(text);
    context.finish().as_ref().try_into().expect("SHA-256 gives 32 bytes")
}
