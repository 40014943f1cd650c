//! What the integration tests of this crate share.

pub(crate) mod frames;
pub(crate) mod netns;
