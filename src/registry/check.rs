//! Finds out what a login is good for, as a run would, and leaves nothing at the registry.
//!
//! Whether a push would work is what the token says that it grants. Where no token says so, an upload is opened and given
//! up before a byte of it is sent.

use url::Url;

use super::{
    envelope::clean,
    error::Error,
    repository::Repository,
    upload::{Sessions, Started},
};
use crate::{
    auth::{Challenge, Grant, Token},
    oci::Digest,
};

/// What a registry let somebody see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Probe {
    /// The digest of the tag that was looked up.
    Digest(Digest),
    /// It was looked up, and is not there.
    Absent,
    /// The tags were listed.
    Listed,
}

impl Repository {
    /// Looks a tag or digest up, or the first page of the tags.
    pub async fn try_pull(&self, reference: Option<&str>) -> Result<Probe, Error> {
        let Some(reference) = reference else { return self.tags(1).await.map(|_| Probe::Listed) };
        Ok(self.head(reference).await?.map_or(Probe::Absent, Probe::Digest))
    }

    /// Whether a blob could be sent. An upload that had to be opened is left to `sessions` to be given up.
    pub async fn try_push(&self, sessions: &Sessions) -> Result<(), Error> {
        if self.grants().await?.is_some_and(|grants| self.may(&grants, "push")) {
            return Ok(());
        }
        if let Started::Session(upload) = self.start_upload(&Digest::sha256(b""), None).await? {
            drop(sessions.open(upload));
        }
        Ok(())
    }

    /// What the token says that it grants here, such as `repository:team/app:pull`; `None` where the registry wants no token,
    /// or the token does not say.
    pub async fn granted(&self) -> Result<Option<Vec<String>>, Error> {
        let ours = |grant: &Grant| (grant.name == self.name().as_str()).then(|| self.shown(&grant.to_string()));
        Ok(self.grants().await?.map(|grants| grants.iter().filter_map(ours).collect()))
    }

    /// What the registry has asked for so far, in words.
    #[must_use]
    pub fn asked_for(&self) -> Vec<String> {
        let challenges = self.known().challenges();
        let in_words = |challenge: &Challenge| match challenge {
            Challenge::Basic => "user and password (Basic)".to_owned(),
            Challenge::Bearer { realm, service, .. } => {
                let service = service.as_ref().map(|service| format!(" for the service {service}"));
                self.shown(&format!("a token (Bearer) of {}{}", place_of(realm), service.unwrap_or_default()))
            }
        };
        challenges.iter().map(in_words).collect()
    }

    async fn grants(&self) -> Result<Option<Vec<Grant>>, Error> {
        let authorization = self.authorization(0, (None, None), self.scope(), self.name().as_str()).await?;
        Ok(authorization.token().and_then(Token::grants))
    }

    fn may(&self, grants: &[Grant], action: &str) -> bool {
        grants.iter().any(|grant| grant.name == self.name().as_str() && grant.allows(action))
    }

    /// What a registry says, unless it repeats what it was shown.
    fn shown(&self, text: &str) -> String {
        if self.repeats_a_secret(text) { "[hidden]".to_owned() } else { clean(text) }
    }
}

/// A realm without what may be a login or a token in it.
fn place_of(realm: &str) -> String {
    match Url::parse(realm) {
        Ok(url) => format!("{}://{}{}", url.scheme(), super::send::host_of(&url), url.path()),
        Err(_) => "a realm that is no URL".to_owned(),
    }
}
