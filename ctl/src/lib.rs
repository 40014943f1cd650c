//! The control plane: JSON lines on a unix socket, and cirroctl.
