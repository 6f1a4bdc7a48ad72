//! Whether the parts of a configuration fit together.

use super::Config;
use crate::options::SocketAddress;
use crate::options::{BlockRef, BlockdevOptions, Driver};
use crate::options::{ConfigError, closest};
use std::collections::HashSet;

/// Refuses names that are given twice and references to what does not exist.
pub(super) fn check(config: &Config) -> Result<(), ConfigError> {
    unique(
        "--object",
        "id",
        config.objects.iter().map(|object| object.id()),
    )?;
    unique(
        "--chardev",
        "id",
        config.chardevs.iter().map(|chardev| chardev.id.as_str()),
    )?;
    unique(
        "--export",
        "id",
        config.exports.iter().map(|export| export.id.as_str()),
    )?;
    let mut nodes = Vec::new();
    for node in &config.blockdevs {
        check_node(node, "", &mut nodes).map_err(|error| {
            error.in_option("--blockdev", node.node_name.as_deref().unwrap_or_default())
        })?;
    }
    check_exports(config, &nodes)?;
    check_monitors(config)?;
    unique_sockets(config)
}

fn unique<'a>(
    option: &str,
    key: &str,
    names: impl Iterator<Item = &'a str>,
) -> Result<(), ConfigError> {
    let mut seen = HashSet::new();
    for name in names {
        if !seen.insert(name) {
            let text = format!("the {key} '{name}' is given twice");
            return Err(ConfigError::other(text).in_option(option, &format!("{key}={name}")));
        }
    }
    Ok(())
}

/// Checks one node and adds its name, and those of the nodes inside it, to `nodes`.
fn check_node<'a>(
    node: &'a BlockdevOptions,
    path: &str,
    nodes: &mut Vec<&'a str>,
) -> Result<(), ConfigError> {
    for (key, child) in node.children() {
        let path = format!("{path}{key}");
        match child {
            BlockRef::Name(name) => known_node(name, &path, nodes)?,
            BlockRef::Inline(child) => check_node(child, &format!("{path}."), nodes)?,
        }
    }
    if let Driver::CopyOnRead(options) = &node.driver
        && let Some(bottom) = &options.bottom
    {
        known_node(bottom, &format!("{path}bottom"), nodes)?;
    }
    if let Some(name) = node.node_name.as_deref() {
        if nodes.contains(&name) {
            let text = format!("there are two nodes named '{name}'");
            return Err(ConfigError::other(text).near(format!("{path}node-name={name}")));
        }
        nodes.push(name);
    }
    Ok(())
}

fn known_node(name: &str, key: &str, nodes: &[&str]) -> Result<(), ConfigError> {
    if nodes.contains(&name) {
        return Ok(());
    }
    let mut text = format!("there is no node named '{name}' to the left of here");
    if name.contains('/') {
        text = format!(
            "'{key}' takes the name of a node; for a file write \
             {key}.driver=file,{key}.filename={name}"
        );
    } else if let Some(guess) = closest(name, nodes) {
        text.push_str(&format!(" (did you mean '{guess}'?)"));
    }
    Err(ConfigError::other(text).near(format!("{key}={name}")))
}

fn check_exports(config: &Config, nodes: &[&str]) -> Result<(), ConfigError> {
    for export in &config.exports {
        let in_option =
            |text: String, near: String| Err(ConfigError::other(text).in_option("--export", &near));
        let node = export.node_name.as_str();
        if !nodes.contains(&node) {
            let guess = closest(node, nodes)
                .map(|guess| format!(" (did you mean '{guess}'?)"))
                .unwrap_or_default();
            let text = format!("no --blockdev defines a node named '{node}'{guess}");
            return in_option(text, format!("node-name={node}"));
        }
        if let Some(iothread) = &export.iothread
            && !config.objects.iter().any(|object| object.id() == iothread)
        {
            let text = format!("no --object defines an iothread named '{iothread}'");
            return in_option(text, format!("iothread={iothread}"));
        }
    }
    Ok(())
}

fn check_monitors(config: &Config) -> Result<(), ConfigError> {
    for monitor in &config.monitors {
        let chardev = &monitor.chardev;
        if !config
            .chardevs
            .iter()
            .any(|candidate| candidate.id == *chardev)
        {
            let text = format!("no --chardev defines a socket named '{chardev}'");
            let near = format!("chardev={chardev}");
            return Err(ConfigError::other(text).in_option("--monitor", &near));
        }
    }
    unique(
        "--monitor",
        "chardev",
        config
            .monitors
            .iter()
            .map(|monitor| monitor.chardev.as_str()),
    )
}

/// Two listeners on one address would take each other's place without a word.
fn unique_sockets(config: &Config) -> Result<(), ConfigError> {
    let chardevs = config.chardevs.iter();
    if chardevs
        .clone()
        .filter(|chardev| chardev.addr.is_none())
        .count()
        > 1
    {
        let text = "cannot use stdio by multiple character devices";
        return Err(ConfigError::other(text).in_option("--chardev", "stdio"));
    }
    if config.daemonize && chardevs.clone().any(|chardev| chardev.addr.is_none()) {
        let text = "a daemon in the background has no standard input (expected --chardev socket, \
                    or no --daemonize)";
        return Err(ConfigError::other(text).in_option("--chardev", "stdio"));
    }
    let chardevs = chardevs.filter_map(|chardev| chardev.addr.as_ref());
    let exports = config.exports.iter().map(|export| &export.addr);
    let mut seen: Vec<&SocketAddress> = Vec::new();
    for addr in chardevs.chain(exports) {
        if seen.contains(&addr) {
            return Err(ConfigError::other(format!(
                "the socket {addr} is used twice"
            )));
        }
        seen.push(addr);
    }
    Ok(())
}
