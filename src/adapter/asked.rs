//! [`Asked`]: which parts of an adapter a model has asked for so far.

use super::locked;
use super::stored::{Stored, StoredLayer};
use crate::error::Result;
use std::collections::BTreeMap;
use std::sync::Mutex;

/// Modules and extra tensors that were asked for, with the rule and the path.
#[derive(Debug, Default)]
pub(crate) struct Asked(Mutex<BTreeMap<String, (u8, String)>>);

impl Asked {
    /// The module that means a path. None where it means one better that was asked for before; an
    /// error where it means one that was asked for before no better.
    pub(crate) fn find<'a>(
        &self,
        stored: &'a Stored,
        path: &str,
    ) -> Result<Option<(&'a str, &'a StoredLayer)>> {
        let Some((rule, module, layer)) = stored.rank(path)? else {
            return Ok(None);
        };
        let free = self.is_free(stored, module, rule, path)?;
        Ok(free.then_some((module, layer)))
    }

    /// Whether a module that means a path under some rule means no other better; an error where it means
    /// another no worse.
    pub(crate) fn is_free(
        &self,
        stored: &Stored,
        module: &str,
        rule: u8,
        path: &str,
    ) -> Result<bool> {
        match locked(&self.0).get(module) {
            Some((_, other)) if other == path => Ok(true),
            Some((better, _)) if *better < rule => Ok(false),
            Some((_, other)) => stored.ambiguous([other, path], module, "rename"),
            None => Ok(true),
        }
    }

    /// Enters the module that means a path.
    pub(crate) fn insert(&self, stored: &Stored, path: &str) -> Result<()> {
        if let Some((rule, module, _)) = stored.rank(path)? {
            self.enter(module, rule, path);
        }
        Ok(())
    }

    /// Enters the module that means a path, which must not have been taken for another path meanwhile: layers may
    /// be built by several threads.
    pub(super) fn claim(&self, stored: &Stored, path: &str) -> Result<()> {
        let Some((rule, module, _)) = stored.rank(path)? else {
            return Ok(());
        };
        let mut asked = locked(&self.0);
        match asked.get(module) {
            Some((_, other)) if other != path => {
                let other = other.clone();
                drop(asked);
                stored.ambiguous([&other, path], module, "rename")
            }
            _ => {
                asked.insert(module.to_string(), (rule, path.to_string()));
                Ok(())
            }
        }
    }

    /// Enters a module that means a path under some rule.
    pub(crate) fn enter(&self, module: &str, rule: u8, path: &str) {
        locked(&self.0).insert(module.to_string(), (rule, path.to_string()));
    }

    /// Whether a module was found by that rule or one behind it.
    pub(crate) fn any_behind(&self, rule: u8) -> bool {
        locked(&self.0).values().any(|(found, _)| *found >= rule)
    }

    /// Enters an extra tensor.
    pub(crate) fn insert_extra(&self, name: &str) {
        locked(&self.0).insert(name.to_string(), (0, name.to_string()));
    }

    /// The paths by which modules were asked for.
    pub(crate) fn paths(&self, stored: &Stored) -> Vec<String> {
        let asked = locked(&self.0);
        let modules = stored.layers.keys().filter_map(|module| asked.get(module));
        modules.map(|(_, path)| path.clone()).collect()
    }

    pub(crate) fn is_empty(&self) -> bool {
        locked(&self.0).is_empty()
    }

    /// Becomes what another one is.
    pub(crate) fn copy_from(&self, other: &Self) {
        let asked = locked(&other.0).clone();
        *locked(&self.0) = asked;
    }

    /// Modules, then extra tensors, that were not asked for.
    pub(crate) fn unused<'a>(&self, stored: &'a Stored) -> Vec<&'a String> {
        let asked = locked(&self.0);
        let all = stored.layers.keys().chain(stored.extras.keys());
        all.filter(|name| !asked.contains_key(*name)).collect()
    }
}
