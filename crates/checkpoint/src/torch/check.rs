//! The checksums inside of torch's files, which torch itself does not compare when it loads.

use std::path::Path;

use super::dcp::{self, Place};
use super::zip::Archive;
use crate::damage::{Damage, crc_of};
use crate::region::Region;
use crate::storage::PageBuffer;
use crate::{Format, Result};

/// One archive to check.
pub(crate) struct Item {
    name: String,
    region: Region,
    /// Of an item of a distributed checkpoint.
    place: Option<Place>,
    fqns: Vec<String>,
}

/// All archives of what is at `path`, and the number of files; what cannot be opened is damage.
pub(crate) fn items(path: &Path, format: Format) -> Result<(usize, Vec<std::result::Result<Item, Damage>>)> {
    if format == Format::TorchSave {
        let region = Region::open(path, true)?;
        // Refuses what is no archive of torch's at once.
        Archive::open(region.clone())?;
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        return Ok((1, vec![Ok(Item { name, region, place: None, fqns: Vec::new() })]));
    }
    let (mut files, mut found) = (std::collections::HashMap::new(), Vec::new());
    for (fqn, place) in dcp::Reader::new(path).places()? {
        let file =
            files.entry(place.file.clone()).or_insert_with(|| Region::open(&path.join(&place.file), false));
        let damage = |what: String| Damage {
            file: place.file.clone(),
            offset_bytes: place.offset_bytes,
            what,
            fqns: vec![fqn.clone()],
        };
        found.push(match file {
            Err(error) => Err(damage(error.to_string())),
            Ok(file) => match dcp::item_region(file, &place) {
                Err(error) => Err(damage(error.to_string())),
                // Safetensors images have no checksums.
                Ok(None) => continue,
                Ok(Some(region)) => {
                    Ok(Item { name: place.file.clone(), region, place: Some(place), fqns: vec![fqn] })
                }
            },
        });
    }
    Ok((files.len(), found))
}

impl Item {
    /// Compares the checksum of every record; the bytes that were read.
    pub(crate) fn check(&self, buffer: &mut PageBuffer) -> (u64, Vec<Damage>) {
        match self.damaged_records(buffer) {
            Ok(damages) => (self.region.len(), damages),
            Err(error) => (self.region.len(), vec![self.damage(self.region.start(), error.to_string())]),
        }
    }

    fn damaged_records(&self, buffer: &mut PageBuffer) -> Result<Vec<Damage>> {
        let region = match &self.place {
            Some(place) => dcp::whole_item(self.region.clone(), place)?,
            None => self.region.clone(),
        };
        let archive = Archive::open(region)?;
        let mut damages = Vec::new();
        for (record, region, expected) in archive.checked_records() {
            let Some(region) = region else { continue };
            let got = crc_of(&region, buffer)?;
            if got != expected {
                let what = format!("record {record}: CRC32 {got:08x}, expected {expected:08x}");
                damages.push(self.damage(region.start(), what));
            }
        }
        Ok(damages)
    }

    fn damage(&self, offset_bytes: u64, what: String) -> Damage {
        Damage { file: self.name.clone(), offset_bytes, what, fqns: self.fqns.clone() }
    }
}
