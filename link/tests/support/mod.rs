//! What the integration tests of this crate share.

pub(crate) mod netns;
