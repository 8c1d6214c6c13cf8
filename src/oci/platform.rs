//! Platforms (image-spec, image-index.md): what an image runs on, and which of them a user keeps.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// What an image runs on, as an index or a configuration says it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Platform {
    /// Such as `linux`.
    pub os: String,
    /// Such as `amd64`.
    pub architecture: String,
    /// Such as `v7`.
    pub variant: Option<String>,
}

/// A platform that a user keeps: `os/arch` with any variant, or `os/arch/variant`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PlatformFilter {
    os: Box<str>,
    architecture: Box<str>,
    variant: Option<Box<str>>,
}

/// Text that is not a platform.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid platform {0:?}: write os/arch or os/arch/variant, such as linux/amd64 or linux/arm/v7")]
pub struct PlatformError(String);

impl PlatformFilter {
    /// Whether an image for this platform is kept. The variant that an architecture has when none is named is the same
    /// as naming it: `arm64` is `arm64/v8`, `arm` is `arm/v7`, `amd64` is `amd64/v1`.
    #[must_use]
    pub fn keeps(&self, platform: &Platform) -> bool {
        let variant = self.variant.as_deref();
        *self.os == *platform.os
            && *self.architecture == *platform.architecture
            && variant.is_none_or(|wanted| Some(wanted) == platform.variant.as_deref().or_else(|| self.usual_variant()))
    }

    fn usual_variant(&self) -> Option<&'static str> {
        match &*self.architecture {
            "amd64" => Some("v1"),
            "arm" => Some("v7"),
            "arm64" => Some("v8"),
            _ => None,
        }
    }
}

impl FromStr for PlatformFilter {
    type Err = PlatformError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_word = |part: &str| {
            !part.is_empty() && part.len() <= 32 && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
        };
        let parts: Vec<&str> = text.split('/').collect();
        match parts[..] {
            [os, architecture] if is_word(os) && is_word(architecture) => {
                Ok(Self { os: os.into(), architecture: architecture.into(), variant: None })
            }
            [os, architecture, variant] if parts.iter().all(|part| is_word(part)) => {
                Ok(Self { os: os.into(), architecture: architecture.into(), variant: Some(variant.into()) })
            }
            _ => Err(PlatformError(text.chars().take(80).collect())),
        }
    }
}

impl fmt::Display for PlatformFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.as_ref().map_or(Ok(()), |variant| write!(f, "/{variant}"))
    }
}

impl Serialize for PlatformFilter {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PlatformFilter {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_keeps_what_it_names() {
        for (filter, os, architecture, variant, expected) in [
            ("linux/amd64", "linux", "amd64", None, true),
            ("linux/amd64", "linux", "amd64", Some("v3"), true),
            ("linux/amd64/v1", "linux", "amd64", None, true),
            ("linux/amd64/v1", "linux", "amd64", Some("v3"), false),
            ("linux/arm64", "linux", "arm64", Some("v8"), true),
            ("linux/arm64/v8", "linux", "arm64", None, true),
            ("linux/arm/v7", "linux", "arm", Some("v6"), false),
            ("linux/arm/v7", "linux", "arm", None, true),
            ("linux/arm", "linux", "arm", Some("v6"), true),
            ("linux/amd64", "windows", "amd64", None, false),
            ("linux/amd64", "unknown", "unknown", None, false),
            ("linux/riscv64/v1", "linux", "riscv64", None, false),
        ] {
            let platform =
                Platform { os: os.into(), architecture: architecture.into(), variant: variant.map(Into::into) };
            let parsed: PlatformFilter = filter.parse().unwrap();
            assert_eq!(parsed.keeps(&platform), expected, "{filter} of {platform:?}");
            assert_eq!(parsed.to_string(), filter);
        }
    }

    #[test]
    fn other_text_is_refused() {
        for bad in ["", "linux", "linux/", "/amd64", "linux/amd64/", "linux/arm/v7/x", "Linux/amd64", "linux amd64"] {
            assert!(bad.parse::<PlatformFilter>().is_err(), "{bad} was accepted");
        }
    }
}
