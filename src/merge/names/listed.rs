//! [`Listed`]: a table that was given as JSON.

use super::NamedRows;
use crate::error::{Error, Result, shown};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

pub(super) const EXPECTED: &str =
    "an object with `layers`, from module to tensor, and `unnamed`, a list of prefixes";

/// Where each layer is, by tensor. A layer without rows has all of them.
#[derive(Clone, Debug)]
pub(super) struct Listed {
    layers: BTreeMap<String, Vec<(String, Place)>>,
    unnamed: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(deserialize_with = "pairs")]
    layers: Vec<(String, Entry)>,
    #[serde(default)]
    unnamed: Vec<String>,
}

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "expected the name of a tensor, or an object of `tensor`, `rows`, `transposed`"
)]
enum Entry {
    Whole(String),
    Part(Place),
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Place {
    tensor: String,
    rows: Option<Vec<(usize, usize)>>,
    #[serde(default)]
    transposed: bool,
}

/// The entries of an object in their order; one that is there twice is there twice.
fn pairs<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<(String, Entry)>, D::Error> {
    struct Pairs;
    impl<'de> Visitor<'de> for Pairs {
        type Value = Vec<(String, Entry)>;

        fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
            f.write_str("an object from module to tensor")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut pairs = Vec::new();
            while let Some(pair) = map.next_entry()? {
                pairs.push(pair);
            }
            Ok(pairs)
        }
    }
    from.deserialize_map(Pairs)
}

impl Listed {
    /// The table, or what is wrong with it.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let file: File = serde_json::from_str(text).map_err(|e| e.to_string())?;
        let (mut modules, mut layers) = (BTreeSet::new(), BTreeMap::<_, Vec<_>>::new());
        for (module, entry) in file.layers {
            let place = match entry {
                Entry::Part(place) => place,
                Entry::Whole(tensor) => Place {
                    tensor,
                    rows: None,
                    transposed: false,
                },
            };
            let name = shown(&module);
            if !modules.insert(module.clone()) {
                return Err(format!("`{name}` is named twice"));
            }
            let empty =
                |rows: &Vec<(usize, usize)>| rows.is_empty() || rows.iter().any(|(a, b)| a >= b);
            if place.rows.as_ref().is_some_and(empty) {
                return Err(format!("`{name}` has a range of no rows"));
            }
            let there = layers.entry(place.tensor.clone()).or_default();
            there.push((module, place));
            if let Some(reason) = crossed(there) {
                return Err(reason);
            }
        }
        Ok(Self {
            layers,
            unnamed: file.unnamed,
        })
    }

    pub(super) fn covers(&self, tensor: &str) -> bool {
        !self.unnamed.iter().any(|prefix| tensor.starts_with(prefix))
    }

    pub(super) fn parts(&self, tensor: &str, shape: &[usize]) -> Result<Option<Vec<NamedRows>>> {
        let Some(layers) = self.layers.get(tensor) else {
            return Ok(None);
        };
        let mut parts = Vec::new();
        for (module, place) in layers {
            let rows = match place.transposed {
                true => shape.get(1).copied().unwrap_or(0),
                false => shape.first().copied().unwrap_or(0),
            };
            let named = place.rows.iter().flatten().map(|(from, to)| *from..*to);
            let ranges: Vec<_> = match place.rows {
                Some(_) => named.collect(),
                None => super::cut(0, rows),
            };
            let last = ranges.iter().map(|range| range.end).max().unwrap_or(0);
            if last > rows || place.transposed && shape.len() != 2 {
                let found = format!("row {last} of `{}` for `{}`", shown(tensor), shown(module));
                let expected = format!("rows of a tensor of shape {shape:?}");
                return Err(Error::argument("NameTable", "the table", found, expected));
            }
            parts.push(NamedRows {
                module: module.clone(),
                aliases: Vec::new(),
                rows: ranges,
                transposed: place.transposed,
            });
        }
        Ok(Some(parts))
    }
}

/// What is wrong with the newest layer of a tensor beside the others, and in itself.
fn crossed(layers: &[(String, Place)]) -> Option<String> {
    let ((newest, place), others) = layers.split_last()?;
    let every = [(0, usize::MAX)];
    let ranges = |place: &Place| place.rows.clone().unwrap_or_else(|| every.to_vec());
    let meet = |a: &(usize, usize), b: &(usize, usize)| a.0 < b.1 && b.0 < a.1;
    let own = ranges(place);
    for (i, range) in own.iter().enumerate() {
        if own[..i].iter().any(|other| meet(range, other)) {
            return Some(format!("`{}` has a row twice", shown(newest)));
        }
        for (other, there) in others {
            let both = ranges(there).iter().any(|theirs| meet(range, theirs));
            if both || there.transposed != place.transposed {
                let (a, b, tensor) = (shown(other), shown(newest), shown(&place.tensor));
                return Some(format!("`{a}` and `{b}` share rows of `{tensor}`"));
            }
        }
    }
    None
}
