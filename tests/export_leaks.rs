//! Front-ends that come and go. Alone in its program: it counts what the process has.

mod export_common;

use export_common::hand::*;
use export_common::*;
use vhost::VhostBackend;

/// What a process can leak.
#[derive(Debug, PartialEq, Eq)]
struct Holdings {
    descriptors: usize,
    threads: usize,
    mappings: usize,
}

fn holdings() -> Holdings {
    let count = |path: &str| std::fs::read_dir(path).unwrap().count();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    Holdings {
        descriptors: count("/proc/self/fd"),
        threads: count("/proc/self/task"),
        mappings: maps.lines().filter(|line| line.contains("memfd:")).count(),
    }
}

/// Catches: threads, descriptors or mapped memory that a session leaves behind, however it
/// ends; and threads and sockets that an export leaves behind.
#[test]
fn two_hundred_front_ends_leave_nothing_behind() {
    let place = Place::new();
    let (root, _storage) = memory_root(vec![0; 1 << 20]);
    let nothing = holdings();
    let config = stratablk::export::ExportConfig {
        queues: 2,
        ..place.config()
    };
    let export = start(config, root);
    let session = |round: u32| {
        let mut hand = Hand::connect(&place.socket(), PLAIN);
        match round % 5 {
            0 => {}
            1 => hand.set_up(),
            2 => {
                hand.set_up();
                hand.front.get_vring_base(0).unwrap();
            }
            3 => {
                hand.set_up();
                hand.raw_message(250, &[]);
                hand.expect_closed();
                return;
            }
            _ => {
                // In the middle of a message.
                hand.set_up();
                hand.socket.shutdown(std::net::Shutdown::Write).unwrap();
            }
        }
        if round % 5 == 1 {
            assert_eq!(hand.request(0, 0, &[(DATA, 512, true)]).1, 0);
        }
    };
    let idle = || eventually("the session ends", || !export.info().connected);
    session(1);
    idle();
    let before = holdings();
    for round in 0..200 {
        session(round);
    }
    idle();
    eventually("all is given back", || holdings() == before);
    export.shutdown();
    assert!(!place.socket().exists());
    drop(export);
    eventually("nothing is left", || holdings() == nothing);
}
