//! The control tool: a QMP client and its commands.
