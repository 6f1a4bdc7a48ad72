//! The images, the command line and the guests that a walk begins with.

use std::collections::BTreeSet;
use std::fs;

use serde_json::{Value, json};

use crate::common::daemon::Program;
use crate::common::rng::Rng;
use crate::common::{Res, images};
use crate::cut_fs::CutFs;
use crate::guest::{Guest, Look};
use crate::scene::{CLUSTERS, DISK, Scene, files, make_stable};
use crate::world::{self, Node, World};

impl Scene {
    /// So many disks, each an image over another one. With `power` the power may fail.
    pub fn new(seed: u64, disks: usize, power: bool, program: Program) -> Res<Self> {
        let mut rng = Rng::new(seed);
        let dir = tempfile::tempdir()?;
        let journals = tempfile::tempdir_in("/dev/shm")?;
        let images = dir.path().join("images");
        fs::create_dir(&images)?;
        let cut = match power {
            true => CutFs::mount(&images),
            false => None,
        };
        fs::create_dir(images.join("state"))?;
        let mut scene = Scene {
            guests: Vec::new(),
            life: None,
            world: World::default(),
            down: BTreeSet::new(),
            rng: Rng::new(rng.next()),
            made: 0,
            killed: false,
            images,
            args: Vec::new(),
            program,
            cut,
            journals,
            dir,
        };
        scene.words("--state", "state")?;
        scene
            .args
            .extend(["--state-name", "walk"].map(str::to_owned));
        let folder = images::text(scene.journals.path())?.to_owned();
        scene.args.extend(["--journal".to_owned(), folder]);
        let socket = scene.socket("qmp")?;
        let chardev = format!("socket,id=c,path={socket},server=on,wait=off");
        scene.args.extend(["--chardev".to_owned(), chardev]);
        scene.args.extend(["--monitor", "c"].map(str::to_owned));
        for number in 0..disks {
            scene.add_disk(number)?;
        }
        scene.stable()?;
        scene.start()?;
        scene.connect(Look::Nothing)?;
        Ok(scene)
    }

    fn words(&mut self, option: &str, file: &str) -> Res<()> {
        let file = self.file(file)?;
        self.args.extend([option.to_owned(), file]);
        Ok(())
    }

    fn add_disk(&mut self, number: usize) -> Res<()> {
        let layers = 2 + number % 2;
        let owners = self.rng.clone();
        let mut below: Option<(String, String)> = None;
        let plan = images::ChainPlan {
            sectors: DISK / 512,
            layers: [
                CLUSTERS[0],
                CLUSTERS[(number + 1) % CLUSTERS.len()],
                CLUSTERS[0],
            ]
            .into_iter()
            .take(layers)
            .collect(),
            pieces: 12,
        };
        let folder = self.images.join(format!("disk{number}"));
        fs::create_dir(&folder)?;
        let chain = images::make_chain(&folder, &plan, &mut owners.clone())?;
        self.rng.next();
        for (path, _) in chain.layers.iter().rev() {
            let (name, file) = (self.name("n"), images::text(path)?.to_owned());
            let backing = below.as_ref().map(|(name, _)| name.as_str());
            let options = world::options(&name, &file, backing);
            self.args
                .extend(["--blockdev".to_owned(), options.to_string()]);
            let node = Node {
                file: file.clone(),
                backing: backing.map(str::to_owned),
                header: below.as_ref().map(|(_, file)| file.clone()),
                empty: false,
                left: false,
                size: DISK,
                snapshots: BTreeSet::new(),
            };
            self.world.nodes.insert(name.clone(), node);
            below = Some((name, file));
        }
        let id = format!("e{number}");
        let (top, _) = below.ok_or("no layers")?;
        let socket = self.export_socket(&id)?;
        let export = self.export_options(&id, &top)?;
        self.args
            .extend(["--export".to_owned(), export.to_string()]);
        self.world.exports.insert(id.clone(), top);
        self.world.sizes.insert(id.clone(), DISK);
        let rng = Rng::new(self.rng.next());
        let guest = Guest::new(socket.into(), &chain.owners, rng);
        self.guests.push((id, guest));
        Ok(())
    }

    /// The options of an export.
    pub fn export_options(&self, id: &str, node: &str) -> Res<Value> {
        let addr = json!({"type": "unix", "path": self.export_socket(id)?});
        Ok(
            json!({"type": "vhost-user-blk", "id": id, "node-name": node, "addr": addr,
            "writable": true}),
        )
    }

    /// Makes all files stable that the tests have made before the first start.
    fn stable(&self) -> Res<()> {
        for path in files(&self.images)? {
            make_stable(&path)?;
        }
        Ok(fs::File::open(&self.images)?.sync_all()?)
    }
}
