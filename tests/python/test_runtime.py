"""Nodes and exports that come and go, asked for by QEMU's own client.

What would be caught: a command or an event that `qemu.qmp` does not understand, and a daemon with
nothing but its control socket that does not start.
"""

import pytest

from harness import images
from harness.images import MIB

pytestmark = pytest.mark.beyond_qsd("drops a connected client, and leaves sockets")


def test_a_disk_comes_and_goes(daemon, tmp_path):
    daemon.start()
    qmp = daemon.qmp()
    assert qmp.cmd("query-block-exports") == []
    image = tmp_path / "new.qcow2"
    qmp.cmd(
        "blockdev-create",
        job_id="make",
        options={"driver": "file", "filename": str(image), "size": 0},
    )
    qmp.wait_event("JOB_STATUS_CHANGE", id="make", status="concluded")
    qmp.cmd("job-dismiss", id="make")
    qmp.cmd("blockdev-add", driver="file", node_name="file", filename=str(image))
    qmp.cmd(
        "blockdev-create",
        job_id="make",
        options={"driver": "qcow2", "file": "file", "size": 8 * MIB},
    )
    qmp.wait_event("JOB_STATUS_CHANGE", id="make", status="concluded")
    assert "error" not in qmp.cmd("query-jobs")[0]
    qmp.cmd("job-dismiss", id="make")
    qmp.cmd("blockdev-add", driver="qcow2", node_name="disk", file="file")
    socket = tmp_path / "disk.sock"
    qmp.cmd(
        "block-export-add",
        type="vhost-user-blk",
        id="e",
        node_name="disk",
        writable=True,
        addr={"type": "unix", "path": str(socket)},
    )
    assert socket.is_socket()
    assert qmp.refused("blockdev-del", node_name="disk") == ("GenericError", "Node disk is in use")
    qmp.cmd("block-export-del", id="e")
    qmp.wait_event("BLOCK_EXPORT_DELETED", id="e")
    assert not socket.exists()
    qmp.cmd("blockdev-del", node_name="disk")
    qmp.cmd("blockdev-del", node_name="file")
    assert qmp.cmd("query-named-block-nodes") == []
    assert images.info(image)["virtual-size"] == 8 * MIB
