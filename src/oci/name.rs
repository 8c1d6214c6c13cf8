//! Host, repository name and tag (distribution-spec, "Pulling manifests": the grammar of `<name>` and `<reference>`).

use std::{fmt, str::FromStr, sync::LazyLock};

use regex::Regex;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Text that is not a host, repository name or tag.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid {what} {text:?}: {rule}")]
pub struct NameError {
    what: &'static str,
    text: String,
    rule: &'static str,
}

/// A registry's `host[:port]`, in lower case. The names of Docker Hub are all `docker.io`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Host(Box<str>);

/// A repository name such as `library/nginx`, at most 255 characters.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RepositoryName(Box<str>);

/// A tag, at most 128 characters.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag(Box<str>);

fn pattern(text: &str) -> Regex {
    #[allow(clippy::expect_used, reason = "the patterns are constants of this file")]
    Regex::new(text).expect("constant pattern")
}

static HOST: LazyLock<Regex> = LazyLock::new(|| {
    let label = "[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?";
    pattern(&format!(r"^(?:{label}(?:\.{label})*|\[[0-9a-f:.]+\])(?::[0-9]{{1,5}})?$"))
});
static REPOSITORY: LazyLock<Regex> = LazyLock::new(|| {
    let part = "[a-z0-9]+(?:(?:\\.|_|__|-+)[a-z0-9]+)*";
    pattern(&format!("^{part}(?:/{part})*$"))
});
static TAG: LazyLock<Regex> = LazyLock::new(|| pattern("^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$"));

impl Host {
    /// The name of Docker Hub in references.
    pub const DOCKER_HUB: &'static str = "docker.io";

    /// The host that is dialled: Docker Hub's API lives elsewhere than its name says.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        if &*self.0 == Self::DOCKER_HUB { "registry-1.docker.io" } else { &self.0 }
    }

    /// The host without its port.
    #[must_use]
    pub fn name(&self) -> &str {
        split_port(&self.0).0
    }

    /// The host as text, with its port if it has one.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Splits `host:port`, also of IPv6 literals.
pub(crate) fn split_port(host: &str) -> (&str, Option<&str>) {
    match host.rsplit_once(':') {
        Some((name, port)) if !port.ends_with(']') && (!name.contains(':') || name.ends_with(']')) => {
            (name, Some(port))
        }
        _ => (host, None),
    }
}

impl FromStr for Host {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let lower = text.to_ascii_lowercase();
        let port_fits = split_port(&lower).1.is_none_or(|port| port.parse::<u16>().is_ok_and(|p| p > 0));
        if lower.len() > 253 || !HOST.is_match(&lower) || !port_fits {
            return Err(NameError {
                what: "registry host",
                text: shorten(text),
                rule: "write host or host:port, without a scheme and without a path",
            });
        }
        let canonical = match lower.as_str() {
            "index.docker.io" | "registry-1.docker.io" | "registry.hub.docker.com" => Self::DOCKER_HUB.into(),
            _ => lower.into(),
        };
        Ok(Self(canonical))
    }
}

impl FromStr for RepositoryName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() > 255 || !REPOSITORY.is_match(text) {
            return Err(NameError {
                what: "repository name",
                text: shorten(text),
                rule: "use lower-case letters, digits and single separators (. _ - /), at most 255 characters",
            });
        }
        Ok(Self(text.into()))
    }
}

impl RepositoryName {
    /// The last part of the path.
    #[must_use]
    pub fn last_part(&self) -> &str {
        self.0.rsplit('/').next().unwrap_or(&self.0)
    }

    /// The path without its last part; empty where there is only one.
    #[must_use]
    pub fn parent(&self) -> &str {
        self.0.rsplit_once('/').map_or("", |(parent, _)| parent)
    }

    /// The whole path.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Tag {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if !TAG.is_match(text) {
            return Err(NameError {
                what: "tag",
                text: shorten(text),
                rule: "use letters, digits, '_', '.' and '-', not starting with '.' or '-', at most 128 characters",
            });
        }
        Ok(Self(text.into()))
    }
}

impl Tag {
    /// The tag as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn shorten(text: &str) -> String {
    text.chars().take(80).collect()
}

macro_rules! text_type {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { f.write_str(&self.0) }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { f.write_str(&self.0) }
        }
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> { serializer.serialize_str(&self.0) }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
            }
        }
    )*};
}
text_type!(Host, RepositoryName, Tag);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_checked_and_docker_hub_has_one_name() {
        for good in ["gcr.io", "localhost:5000", "127.0.0.1:443", "[::1]:5000", "a-b.example", "REGISTRY.example.com"] {
            assert!(good.parse::<Host>().is_ok(), "{good} was refused");
        }
        for bad in [
            "",
            "https://gcr.io",
            "gcr.io/",
            "a b",
            "gcr.io:",
            "gcr.io:99999",
            "gcr.io:0",
            "-a.io",
            "a..b",
            "user@host",
        ] {
            assert!(bad.parse::<Host>().is_err(), "{bad} was accepted");
        }
        let hub: Host = "index.docker.io".parse().unwrap();
        assert_eq!((hub.as_str(), hub.endpoint()), ("docker.io", "registry-1.docker.io"));
        let v6: Host = "[::1]:5000".parse().unwrap();
        assert_eq!(v6.name(), "[::1]");
    }

    #[test]
    fn repository_names_have_parts() {
        let name: RepositoryName = "datadoghq/agent".parse().unwrap();
        assert_eq!((name.parent(), name.last_part()), ("datadoghq", "agent"));
        let single: RepositoryName = "agent".parse().unwrap();
        assert_eq!((single.parent(), single.last_part()), ("", "agent"));
        for bad in ["", "/a", "a/", "a//b", "A", "a___b", "a/../b", "a?b", &"a".repeat(256)] {
            assert!(bad.parse::<RepositoryName>().is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn tags_follow_the_grammar() {
        for good in ["1.2.3", "latest", "_x", "v1.0.0-rc.1_amd64"] {
            assert!(good.parse::<Tag>().is_ok(), "{good} was refused");
        }
        for bad in ["", ".x", "-x", "a/b", "a:b", "ä", &"a".repeat(129)] {
            assert!(bad.parse::<Tag>().is_err(), "{bad} was accepted");
        }
    }
}
