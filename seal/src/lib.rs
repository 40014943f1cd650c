//! What touches payload to protect it: checksums and tags of frames.
