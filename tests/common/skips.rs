//! Tests that cannot run on this machine say so.

/// A test, or a part of one, is skipped for want of something. That is a failure where
/// `STRATABLK_NO_SKIPS=1` says that everything is there.
///
/// # Errors
/// As said.
pub fn skip(what: &str) -> Result<(), String> {
    match std::env::var("STRATABLK_NO_SKIPS").as_deref() {
        Ok("1") => Err(format!("STRATABLK_NO_SKIPS=1, and this cannot run: {what}")),
        _ => {
            println!("skipped: {what}");
            Ok(())
        }
    }
}
