//! What diffusers' own converters make of checkpoints in one file: `tests/golden/names.json`, by `names.py`
//! beside this file.

use super::families::{clip, flux, open_clip, sd3};
use super::merged::SMALL;
use super::spelling::{Spelling, behind};
use super::support::golden::golden;
use super::tables::unet;
use candle_doft::merge::NameTable;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// The models of the file.
fn models() -> candle_core::Result<Vec<(&'static str, Vec<Spelling>)>> {
    let prefix = "model.diffusion_model.";
    let flux = behind(flux(1, 1, true, SMALL), "", "transformer.");
    let sd3 = behind(sd3(2, 1, SMALL), "", "transformer.");
    let sd1 = unet(&[(1, 32), (0, 32)], 1, false, false)?;
    let sdxl = unet(&[(0, 32), (1, 32), (2, 32)], 2, true, true)?;
    let mut sdxl = behind(sdxl, prefix, "unet.");
    let first = "conditioner.embedders.0.transformer.";
    sdxl.extend(behind(clip(1, 16, [30, 8]), first, "text_encoder."));
    let second = "conditioner.embedders.1.model.";
    let encoder = open_clip(1, 24, [30, 8], true);
    sdxl.extend(behind(encoder, second, "text_encoder_2."));
    let sd1 = behind(sd1, prefix, "unet.");
    Ok(vec![
        ("flux", flux),
        ("sd3", sd3),
        ("sd1", sd1),
        ("sdxl", sdxl),
    ])
}

#[test]
fn the_tables_are_those_of_diffusers_own_converters() -> candle_doft::Result<()> {
    let text = std::fs::read(golden("names.json")).unwrap();
    let families: BTreeMap<String, Value> = serde_json::from_slice(&text).unwrap();
    let models = models()?;
    assert_eq!(models.len(), families.len());
    for (family, model) in models {
        let found = model.iter().map(|s| (s.tensor.clone(), json!(s.shape())));
        let tensors: Map<String, Value> = found.collect();
        assert_eq!(
            families[family]["tensors"],
            Value::from(tensors.clone()),
            "{family}"
        );
        let table = NameTable::detect(tensors.keys().map(String::as_str));
        let table = table.expect("the family is found");
        let mut layers = Map::new();
        for spelling in &model {
            for part in table.parts(&spelling.tensor, &spelling.shape())?.unwrap() {
                let rows: Vec<[usize; 2]> = part.rows.iter().map(|r| [r.start, r.end]).collect();
                layers.insert(part.module, json!([spelling.tensor, rows, part.transposed]));
            }
        }
        assert_eq!(families[family]["layers"], Value::from(layers), "{family}");
    }
    Ok(())
}
