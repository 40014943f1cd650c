//! Frames in and out of a machine.
