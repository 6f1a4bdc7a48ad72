//! Checking and repairing damaged images.
//!
//! Whatever the damage: no panic, no endless loop; a check
//! writes nothing; and what is called clean after a repair is found clean by the judge that shares
//! no code with the engine.

use stratablk::format::qcow2::check::{Repair, check, repair};

use super::image::reactor;
use super::recipe::{self, Input};
use super::references;

/// Images up to this length are compared before and after a check.
const COMPARED: u64 = 4 << 20;

/// The target: a recipe whose operations are ignored.
pub fn qcow2_check(data: &[u8]) {
    let mut input = Input(data);
    let (seed, flags, files) = recipe::damaged(&mut input);
    let what = if flags & 4 == 0 {
        Repair::All
    } else {
        Repair::Leaks
    };
    files.image.without_limit();
    reactor().block_on(async {
        let image = &*files.image;
        let contents = || {
            let len = image.end().min(COMPARED);
            image.bytes(0, len as usize)
        };
        let before = contents();
        let found = check(image, &mut |_| ()).await;
        assert!(before == contents(), "a check has written to the image");
        if found.is_err() {
            return;
        }
        let Ok(after) = repair(image, what, &mut |_| ()).await else {
            return;
        };
        // There may be more to be seen than before: what a damaged table had hidden.
        if let Ok(again) = check(image, &mut |_| ()).await {
            assert_eq!(again.corruptions, after.corruptions, "another verdict");
        }
        // The judge looks for bitmaps where a damaged header no longer names them.
        if after.corruptions == 0
            && seed.name != "bitmaps"
            && let Some(report) = references::check(image)
        {
            assert!(report.errors.is_empty(), "called clean: {report:?}");
        }
    });
}
