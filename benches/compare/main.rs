//! The comparison bench: drives `stratablk` and `qemu-storage-daemon` in turn, on the same images,
//! through the same vhost-user front-end, and prints what each of them did.
//!
//! `cargo bench --bench compare -- --help` lists the options; `docs/benchmarks/README.md` says what
//! the rows mean and how to read the table.

#[path = "../../tests/common/mod.rs"]
mod common;

mod blocks;
mod copy;
mod decompress;
mod disks;
mod floor;
mod guest;
mod guest_rows;
mod hung_rows;
mod hung_table;
mod io_rows;
mod load;
mod machine;
mod pairs;
mod report;
mod rounds;
mod row;
mod samples;
mod start_rows;
mod stream_rows;
mod turn_rows;
mod variants;
mod warm;
mod workers;

use clap::Parser;
use common::Res;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Compare stratablk with qemu-storage-daemon, side by side.
#[derive(Parser, Debug)]
struct Options {
    /// One second per run and small images: to see that everything works, not to measure
    #[arg(long)]
    quick: bool,
    /// Seconds measured in each run
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Rounds; each starts every back-end once for each row
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Only rows whose name contains one of these words
    #[arg(long)]
    rows: Vec<String>,
    /// Only back-ends whose name contains one of these words
    #[arg(long)]
    only: Vec<String>,
    /// Another binary of stratablk, an older one for example: measured beside this one as "before"
    #[arg(long)]
    before: Option<PathBuf>,
    /// Also measure this daemon with a journal and an inflight region, as "kept": what completes
    /// outlives it
    #[arg(long)]
    kept: bool,
    /// Also measure a disk beside another one that hangs, for so many seconds, and for as many
    /// without: the same daemon serves both
    #[arg(long, value_name = "SECONDS")]
    hang: Option<f64>,
    /// Folder for the images of the tmpfs rows ("none" leaves them out)
    #[arg(long, default_value = "/dev/shm")]
    dir_tmpfs: PathBuf,
    /// Folder for the images of the disk rows ("none" leaves them out)
    #[arg(long, default_value = "target")]
    dir_disk: PathBuf,
    /// The front-end polls the ring and does not wait for its eventfd
    #[arg(long)]
    poll: bool,
    /// CPU of the front-end
    #[arg(long, default_value_t = 0)]
    cpu_frontend: usize,
    /// CPU of the back-end
    #[arg(long, default_value_t = 1)]
    cpu_backend: usize,
    /// Also write the report to this file
    #[arg(long)]
    output: Option<PathBuf>,
    /// List the rows and exit
    #[arg(long)]
    list: bool,
    /// Given by `cargo bench`; without meaning here
    #[arg(long, hide = true)]
    bench: bool,
}

impl Options {
    fn measured(&self) -> Duration {
        Duration::from_secs_f64(if self.quick { 1.0 } else { self.seconds })
    }

    fn warm_up(&self) -> Duration {
        Duration::from_millis(if self.quick { 100 } else { 300 })
    }

    fn rounds(&self) -> usize {
        if self.quick { 1 } else { self.rounds }
    }

    fn wants_row(&self, name: &str) -> bool {
        self.rows.is_empty() || self.rows.iter().any(|word| name.contains(word.as_str()))
    }

    /// Those of `rows` that are wanted, by their names.
    fn wanted<R>(&self, rows: impl IntoIterator<Item = R>, name: impl Fn(&R) -> String) -> Vec<R> {
        let rows = rows.into_iter();
        rows.filter(|row| self.wants_row(&name(row))).collect()
    }

    /// The size of the disks that requests go to.
    fn disk_size(&self) -> u64 {
        if self.quick { 256 << 20 } else { 1 << 30 }
    }

    /// The folders to measure in, with the name that their rows carry.
    fn places(&self) -> Vec<(&'static str, PathBuf)> {
        [("tmpfs", &self.dir_tmpfs), ("disk", &self.dir_disk)]
            .into_iter()
            .filter(|(_, dir)| dir.as_os_str() != "none")
            .map(|(name, dir)| (name, dir.clone()))
            .collect()
    }
}

fn main() -> ExitCode {
    // What the start rows read in the log.
    // SAFETY: there is one thread so far.
    unsafe { std::env::set_var("STRATABLK_LOG", "info") };
    let options = Options::parse();
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("compare: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Res<()> {
    if options.list {
        for (place, _) in options.places() {
            io_rows::rows(place)
                .iter()
                .for_each(|row| println!("{}", row.name(place)));
            turn_rows::turns()
                .iter()
                .for_each(|row| println!("{}", row.name(place)));
            stream_rows::rows()
                .iter()
                .for_each(|row| println!("{}", row.name(place)));
            start_rows::rows()
                .iter()
                .for_each(|row| println!("{}", row.name(place)));
            if options.hang.is_some() {
                println!("{}", hung_rows::name(place));
            }
            guest_rows::rows(place)
                .iter()
                .for_each(|row| println!("{}", row.name(place)));
        }
        return Ok(());
    }
    machine::require(&["fio", "qemu-img", "qemu-storage-daemon"])?;
    let journals = options.kept.then(|| tempfile::tempdir_in("/dev/shm"));
    let journals = journals.transpose()?;
    let folder = journals.as_ref().map(tempfile::TempDir::path);
    let variants = variants::wanted(&options.only, folder, options.before.as_deref());
    let mut report = report::Report::new(machine::describe(&variants)?);
    common::daemon::pin_this_thread(options.cpu_frontend)?;
    let testbed = guest_rows::prepare(options, &mut report);
    for (place, dir) in options.places() {
        io_rows::measure(options, place, &dir, &variants, &mut report)?;
        turn_rows::measure(options, place, &dir, &variants, &mut report)?;
        stream_rows::measure(options, place, &dir, &variants, &mut report)?;
        start_rows::measure(options, place, &dir, &variants, &mut report)?;
        hung_rows::measure(options, place, &dir, &variants, &mut report)?;
    }
    if let Some(testbed) = &testbed {
        guest_rows::measure(options, &variants, testbed, &mut report)?;
    }
    let text = report.markdown(&variants);
    println!("{text}");
    if let Some(path) = &options.output {
        std::fs::write(path, &text)?;
    }
    if report.failed() {
        Err("some runs failed; see the end of the report".into())
    } else {
        Ok(())
    }
}
