//! What is copied beside the image itself, and what of it.

use crate::oci::Digest;
use serde::{Deserialize, Serialize};

/// How the images of a run are copied.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CopyOptions {
    /// What is attached to an image, such as signatures.
    pub referrers: Referrers,
    /// Layers that their vendors distribute elsewhere.
    pub foreign_layers: ForeignLayers,
}

/// Which of the artifacts that are attached to an image are copied with it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Referrers {
    /// Every one.
    #[default]
    All,
    /// None; nobody asks for them.
    None,
    /// Those of these artifact types.
    Selected(Vec<String>),
}

/// What becomes of layers with `urls`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "operator", derive(schemars::JsonSchema))]
pub enum ForeignLayers {
    /// They stay where their vendors have them, as the image specification allows.
    #[default]
    Skip,
    /// They are copied: from the source if it has them, else from their `urls`, without credentials.
    Copy,
}

impl Referrers {
    /// Whether an artifact of this type is copied.
    #[must_use]
    pub fn selects(&self, artifact_type: Option<&str>) -> bool {
        match self {
            Self::All => true,
            Self::None => false,
            Self::Selected(types) => artifact_type.is_some_and(|found| types.iter().any(|wanted| wanted == found)),
        }
    }
}

/// What a tag must have for it to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expected {
    /// It is written whatever it has.
    Anything,
    /// What it had when the copy was decided on.
    Still(Option<Digest>),
}
