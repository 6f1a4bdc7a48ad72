//! What the device offers: virtio features and features of the vhost-user protocol.

use vhost::vhost_user::message::VhostUserProtocolFeatures;

/// Offered with SEG_MAX: how many data descriptors a request may have.
pub const BLK_SEG_MAX: u64 = 1 << 2;
/// The device is read-only.
pub const BLK_RO: u64 = 1 << 5;
/// The logical block size is in the configuration.
pub const BLK_BLK_SIZE: u64 = 1 << 6;
/// FLUSH requests.
pub const BLK_FLUSH: u64 = 1 << 9;
/// Good sizes for I/O are in the configuration.
pub const BLK_TOPOLOGY: u64 = 1 << 10;
/// The guest may switch the write cache.
pub const BLK_CONFIG_WCE: u64 = 1 << 11;
/// Several queues.
pub const BLK_MQ: u64 = 1 << 12;
/// DISCARD requests.
pub const BLK_DISCARD: u64 = 1 << 13;
/// WRITE_ZEROES requests.
pub const BLK_WRITE_ZEROES: u64 = 1 << 14;
/// Indirect descriptor tables.
pub const RING_INDIRECT_DESC: u64 = 1 << 28;
/// Both sides say at which index they want to be notified.
pub const RING_EVENT_IDX: u64 = 1 << 29;
/// The vhost-user protocol has features of its own.
pub const PROTOCOL_FEATURES: u64 = 1 << 30;
/// Virtio 1.0 and later.
pub const VERSION_1: u64 = 1 << 32;

/// The features of a device.
///
/// SIZE_MAX is not offered, since there is no such limit: guests take an offered 0 for a limit
/// of one page.
#[must_use]
pub fn offered(writable: bool, write_cache: bool) -> u64 {
    let mut features = BLK_SEG_MAX
        | BLK_BLK_SIZE
        | BLK_FLUSH
        | BLK_TOPOLOGY
        | BLK_MQ
        | RING_INDIRECT_DESC
        | RING_EVENT_IDX
        | PROTOCOL_FEATURES
        | VERSION_1;
    if writable {
        features |= BLK_DISCARD | BLK_WRITE_ZEROES;
    } else {
        features |= BLK_RO;
    }
    if write_cache {
        // Without a cache there is nothing to switch.
        features |= BLK_CONFIG_WCE;
    }
    features
}

/// The protocol features of a session.
#[must_use]
pub fn protocol() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::RESET_DEVICE
}
