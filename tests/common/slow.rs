//! Storage that hangs when a test says so, and goes on when it says so.

use super::Res;
use super::frontend::PATIENCE;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A file whose server can be stopped, so that all that is done with the file hangs.
pub struct Slow {
    server: Child,
    /// What is served.
    pub file: PathBuf,
    /// What it is served from.
    pub image: PathBuf,
}

impl Slow {
    /// A file of `len` bytes, zeros until `image` is written. `None`: the machine has no file
    /// systems in user space.
    pub fn mount(dir: &Path, len: u64) -> Res<Option<Self>> {
        let (image, file) = (dir.join("image"), dir.join("slow"));
        File::create(&image)?.set_len(len)?;
        File::create(&file)?;
        let mut command = Command::new("qemu-storage-daemon");
        // SAFETY: between fork and exec one system call is made, which touches no memory. A test
        // that is killed must not leave the server behind.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        let server = command
            .arg("--blockdev")
            .arg(format!(
                "driver=file,node-name=f,filename={}",
                image.display()
            ))
            .arg("--export")
            .arg(format!(
                "type=fuse,id=e,node-name=f,writable=on,mountpoint={}",
                file.display()
            ))
            .stderr(Stdio::null())
            .spawn()?;
        let mut slow = Slow {
            server,
            file,
            image,
        };
        let deadline = Instant::now() + PATIENCE;
        while fs::metadata(&slow.file)?.len() == 0 {
            if slow.server.try_wait()?.is_some() {
                return Ok(None);
            }
            assert!(Instant::now() < deadline, "it never mounts");
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(Some(slow))
    }

    /// Sends the server a signal.
    pub fn signal(&self, signal: i32) {
        // SAFETY: the child has not been waited for, so that its id is its own.
        unsafe { libc::kill(self.server.id() as i32, signal) };
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
        // Nobody else unmounts what the server has left behind.
        if let Ok(file) = std::ffi::CString::new(self.file.as_os_str().as_encoded_bytes()) {
            // SAFETY: the path is a string.
            unsafe { libc::umount2(file.as_ptr(), libc::MNT_DETACH) };
        }
    }
}

/// A block device over a file. What is in flight on it belongs to the kernel, and goes on when the
/// process that asked for it is gone.
pub struct LoopDevice {
    /// Its path.
    pub path: PathBuf,
}

impl LoopDevice {
    /// `None`: this user may not make one.
    pub fn over(file: &Path) -> Res<Option<Self>> {
        let output = Command::new("losetup")
            .args(["--find", "--show", "--direct-io=on", "--sector-size=512"])
            .arg(file)
            .output()?;
        if !output.status.success() {
            return Ok(None);
        }
        let path = String::from_utf8(output.stdout)?.trim_end().into();
        Ok(Some(LoopDevice { path }))
    }

    /// Becomes as long as its file is by now.
    pub fn find_size(&self) -> Res<()> {
        let mut losetup = Command::new("losetup");
        let status = losetup.arg("--set-capacity").arg(&self.path).status()?;
        match status.success() {
            true => Ok(()),
            false => Err(format!("losetup --set-capacity: {status}").into()),
        }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // It goes when its last user has closed it.
        let _ = Command::new("losetup").arg("-d").arg(&self.path).status();
    }
}
