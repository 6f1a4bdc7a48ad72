"""What the tests share: the daemon, its control socket, and disk images."""
