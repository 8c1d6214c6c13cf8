//! Image references as users write them: `[host/]repository[:tag][@digest]`, short names of Docker Hub included.
//!
//! The parsers of the field supply `latest` where no tag is written; a mirror must know the difference, so this one
//! keeps what was said and nothing else.

use std::{fmt, str::FromStr};

use super::{Digest, DigestError, Host, NameError, RepositoryName, Tag};

/// An image reference. `tag` and `digest` are present only where they were written.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference {
    /// The registry.
    pub host: Host,
    /// The repository at that registry.
    pub repository: RepositoryName,
    /// The tag, if one was written.
    pub tag: Option<Tag>,
    /// The digest, if one was written.
    pub digest: Option<Digest>,
}

/// Text that is not an image reference.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    /// The host, repository or tag is malformed.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The digest is malformed.
    #[error(transparent)]
    Digest(#[from] DigestError),
    /// A scheme was written.
    #[error("write {0:?} without a scheme such as https://")]
    Scheme(String),
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.contains("://") {
            return Err(ReferenceError::Scheme(text.chars().take(80).collect()));
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest.parse()?)),
            None => (text, None),
        };
        let (path, tag) = match rest.rsplit_once(':') {
            Some((path, tag)) if !tag.contains('/') => (path, Some(tag.parse()?)),
            _ => (rest, None),
        };
        let (host, repository) = split_host(path)?;
        Ok(Self { host, repository: repository.parse()?, tag, digest })
    }
}

/// The first part is a host if it has a dot or a colon, or is `localhost`, as Docker reads it. Docker takes one with an
/// upper-case letter too; printed in lower case, as hosts are, it would be a repository of Docker Hub.
fn split_host(path: &str) -> Result<(Host, String), NameError> {
    if let Some((first, rest)) = path.split_once('/')
        && (first.contains(['.', ':', '[']) || first.eq_ignore_ascii_case("localhost"))
    {
        let host: Host = first.parse()?;
        let is_short = host.as_str() == Host::DOCKER_HUB && !rest.contains('/');
        return Ok((host, if is_short { format!("library/{rest}") } else { rest.to_owned() }));
    }
    let repository = if path.contains('/') { path.to_owned() } else { format!("library/{path}") };
    Ok((Host::DOCKER_HUB.parse()?, repository))
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_read_as_docker_reads_them() {
        let digest = format!("sha256:{}", "a".repeat(64));
        for (written, read) in [
            ("nginx", "docker.io/library/nginx"),
            ("nginx:1.27", "docker.io/library/nginx:1.27"),
            ("grafana/grafana", "docker.io/grafana/grafana"),
            ("docker.io/nginx", "docker.io/library/nginx"),
            ("index.docker.io/library/nginx", "docker.io/library/nginx"),
            ("gcr.io/datadoghq/agent:7.70.0", "gcr.io/datadoghq/agent:7.70.0"),
            ("localhost/a", "localhost/a"),
            ("LOCALHOST/a", "localhost/a"),
            ("localhost:5000/a:b", "localhost:5000/a:b"),
            ("127.0.0.1:5000/a/b", "127.0.0.1:5000/a/b"),
            (&format!("gcr.io/a/b@{digest}"), &format!("gcr.io/a/b@{digest}")),
            (&format!("gcr.io/a/b:t@{digest}"), &format!("gcr.io/a/b:t@{digest}")),
        ] {
            assert_eq!(written.parse::<Reference>().unwrap().to_string(), read);
        }
        for bad in ["", "https://gcr.io/a", "gcr.io/", "gcr.io/a:", "gcr.io/a@sha256:x", "gcr.io/A", "Library/a", "a b"]
        {
            assert!(bad.parse::<Reference>().is_err(), "{bad} was accepted");
        }
    }
}
