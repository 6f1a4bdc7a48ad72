//! `object-*` and `qom-*`: helper objects that come and go, and their properties.
//!
//! The tree has the objects alone: `/objects/NAME`, or NAME for short.

use serde_json::{Value, json};

use super::args::Args;
use super::command::{Control, Done};
use super::error::{CommandError, ErrorClass};
use crate::engine::Served;
use crate::engine::objects::properties;
use crate::options::{Dialect, ObjectOptions};

/// Makes an object.
pub(super) fn add(control: &Control, args: &Args) -> Done {
    let given = args.to_value();
    let object = ObjectOptions::from_value(&given, Dialect::Json)?;
    control.engine.add_object(object)?;
    Ok(json!({}).into())
}

/// Removes an object.
pub(super) fn del(control: &Control, args: &Args) -> Done {
    control.engine.remove_object(args.required_str("id")?)?;
    Ok(json!({}).into())
}

/// Lists all threads' objects. The thread is the one of the first queue of an export that names
/// it, or the process's first.
pub(super) fn query_iothreads(control: &Control, _: &Args) -> Done {
    let exports = control.engine.exports.list();
    let to_value = |object: &ObjectOptions| -> Value {
        let thread = thread_of(object.id(), &exports);
        let own = [("id", json!(object.id())), ("thread-id", json!(thread))];
        let numbers = properties(object).into_iter();
        let numbers = numbers.map(|(name, number)| (name, json!(number)));
        own.into_iter().chain(numbers).collect()
    };
    let objects = control.engine.runtime.objects.list();
    Ok(objects.iter().map(to_value).collect::<Value>().into())
}

fn thread_of(id: &str, exports: &[Served]) -> i32 {
    let mut exports = exports.iter();
    let found = exports.find(|served| served.options.iothread.as_deref() == Some(id));
    let queue = found.and_then(|served| served.export.stats().first());
    let thread = queue.map(|queue| queue.thread.load(std::sync::atomic::Ordering::Relaxed));
    thread
        .filter(|&thread| thread != 0)
        .unwrap_or_else(|| std::process::id().try_into().unwrap_or_default())
}

/// What a path leads to.
enum Place {
    Root,
    Objects,
    Object(ObjectOptions),
}

impl Place {
    fn find(control: &Control, path: &str) -> Result<Self, CommandError> {
        let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
        let object = |id: &str| control.engine.runtime.objects.find(id).map(Self::Object);
        let found = match parts.as_slice() {
            [] if path.starts_with('/') => Some(Self::Root),
            ["objects"] => Some(Self::Objects),
            ["objects", id] => object(id),
            [id] if !path.starts_with('/') => object(id),
            _ => None,
        };
        found.ok_or_else(|| CommandError {
            class: ErrorClass::DeviceNotFound,
            desc: format!("Device '{path}' not found"),
        })
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::Root | Self::Objects => "container",
            Self::Object(ObjectOptions::Iothread(_)) => "iothread",
        }
    }

    /// Each property with its type and value.
    fn properties(&self, control: &Control) -> Vec<(String, String, Value)> {
        let own = |name: &str, kind: &str, value| (name.to_owned(), kind.to_owned(), value);
        let mut list = vec![own("type", "string", json!(self.kind()))];
        match self {
            Self::Root => list.push(own("objects", "child<container>", json!("/objects"))),
            Self::Objects => {
                let objects = control.engine.runtime.objects.list();
                list.extend(objects.into_iter().map(|object| {
                    let path = json!(format!("/objects/{}", object.id()));
                    let id = object.id().to_owned();
                    let kind = format!("child<{}>", Self::Object(object).kind());
                    (id, kind, path)
                }));
            }
            Self::Object(object) => {
                let numbers = properties(object).into_iter();
                list.extend(numbers.map(|(name, value)| own(name, "int", json!(value))));
            }
        }
        list
    }

    fn no_property(&self, name: &str) -> CommandError {
        CommandError::generic(format!("Property '{}.{name}' not found", self.kind()))
    }
}

/// Lists the properties of an object.
pub(super) fn list(control: &Control, args: &Args) -> Done {
    let place = Place::find(control, args.required_str("path")?)?;
    let list = place.properties(control).into_iter();
    let list = list.map(|(name, kind, _)| json!({"name": name, "type": kind}));
    Ok(list.collect::<Value>().into())
}

/// Tells a property.
pub(super) fn get(control: &Control, args: &Args) -> Done {
    let place = Place::find(control, args.required_str("path")?)?;
    let wanted = args.required_str("property")?;
    let mut list = place.properties(control).into_iter();
    let found = list.find(|(name, ..)| name == wanted);
    let (_, _, value) = found.ok_or_else(|| place.no_property(wanted))?;
    Ok(value.into())
}

/// Sets a property.
pub(super) fn set(control: &Control, args: &Args) -> Done {
    let place = Place::find(control, args.required_str("path")?)?;
    let wanted = args.required_str("property")?;
    let mut list = place.properties(control).into_iter();
    let found = list.find(|(name, ..)| name == wanted);
    let (_, kind, _) = found.ok_or_else(|| place.no_property(wanted))?;
    let Place::Object(object) = &place else {
        return Err(not_writable(&place, wanted));
    };
    if kind != "int" {
        return Err(not_writable(&place, wanted));
    }
    let number = args.value("value").and_then(Value::as_i64).ok_or_else(|| {
        CommandError::generic(format!(
            "Invalid parameter type for '{wanted}', expected: integer"
        ))
    })?;
    let number = u64::try_from(number).map_err(|_| {
        CommandError::generic(format!("{wanted} value must be in range [0, {}]", i64::MAX))
    })?;
    control.engine.set_property(object.id(), wanted, number)?;
    Ok(json!({}).into())
}

fn not_writable(place: &Place, name: &str) -> CommandError {
    CommandError::generic(format!(
        "Property '{}.{name}' is not writable",
        place.kind()
    ))
}
