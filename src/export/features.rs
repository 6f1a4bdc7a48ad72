//! What the device offers: virtio features and features of the vhost-user protocol.

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// Offered with SEG_MAX: how many data descriptors a request may have.
pub const BLK_SEG_MAX: u64 = 1 << VIRTIO_BLK_F_SEG_MAX;
/// The device is read-only.
pub const BLK_RO: u64 = 1 << VIRTIO_BLK_F_RO;
/// The logical block size is in the configuration.
pub const BLK_BLK_SIZE: u64 = 1 << VIRTIO_BLK_F_BLK_SIZE;
/// FLUSH requests.
pub const BLK_FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
/// Good sizes for I/O are in the configuration.
pub const BLK_TOPOLOGY: u64 = 1 << VIRTIO_BLK_F_TOPOLOGY;
/// The guest may switch the write cache.
pub const BLK_CONFIG_WCE: u64 = 1 << VIRTIO_BLK_F_CONFIG_WCE;
/// Several queues.
pub const BLK_MQ: u64 = 1 << VIRTIO_BLK_F_MQ;
/// DISCARD requests.
pub const BLK_DISCARD: u64 = 1 << VIRTIO_BLK_F_DISCARD;
/// WRITE_ZEROES requests.
pub const BLK_WRITE_ZEROES: u64 = 1 << VIRTIO_BLK_F_WRITE_ZEROES;
/// Indirect descriptor tables.
pub const RING_INDIRECT_DESC: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;
/// Both sides say at which index they want to be notified.
pub const RING_EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
/// The vhost-user protocol has features of its own.
pub const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
/// Virtio 1.0 and later.
pub const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;

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
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::BACKEND_REQ
}
