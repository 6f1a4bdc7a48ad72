//! Helper objects that come and go while the daemon runs, and their properties.

use super::objects::{PROPERTIES, poll_max_us};
use super::runtime::Change;
use super::{Engine, Served};
use crate::job::Refused;
use crate::options::{IothreadOptions, ObjectOptions};

impl Engine {
    /// Adds an object.
    ///
    /// # Errors
    /// When its name is taken, or it cannot be recorded.
    pub fn add_object(&self, object: ObjectOptions) -> Result<(), Refused> {
        let _changing = self.runtime.change();
        let given = object.clone();
        let record = || self.record(&[Change::AddObject(&given)]);
        self.runtime.objects.add(object, record)
    }

    /// Removes an object that no export refers to.
    ///
    /// # Errors
    /// When there is none of this name, it is in use, or that cannot be recorded.
    pub fn remove_object(&self, id: &str) -> Result<(), Refused> {
        let _changing = self.runtime.change();
        let names_it = |served: &Served| served.options.iothread.as_deref() == Some(id);
        let is_used = || self.exports.list().iter().any(names_it);
        let record = || self.record(&[Change::RemoveObject(id)]);
        self.runtime.objects.remove(id, is_used, record)
    }

    /// Sets a property of an object, for exports that refer to it as well.
    ///
    /// # Errors
    /// When there is no such object or property, or that cannot be recorded.
    pub fn set_property(&self, id: &str, name: &str, value: u64) -> Result<(), Refused> {
        let property = PROPERTIES.iter().find(|property| property.name == name);
        let property =
            property.ok_or_else(|| Refused(format!("Property 'iothread.{name}' not found")))?;
        let _changing = self.runtime.change();
        let record = |changed: &ObjectOptions| {
            self.record(&[Change::RemoveObject(id), Change::AddObject(changed)])
        };
        let change = |thread: &mut IothreadOptions| (property.set)(thread, value);
        self.runtime.objects.change(id, change, record)?;
        let Some(ObjectOptions::Iothread(thread)) = self.runtime.objects.find(id) else {
            return Ok(());
        };
        for served in self.exports.list() {
            if served.options.iothread.as_deref() == Some(id) {
                served.export.set_poll_max_us(poll_max_us(&thread));
            }
        }
        Ok(())
    }
}
