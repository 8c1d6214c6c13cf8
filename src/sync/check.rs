//! Finds out whether a sync could log in: which entries match each repository, which of them the registry takes, and
//! whether pull and push would work. Copies nothing, and leaves nothing at the target.
//!
//! Every entry is tried alone, in the order of a run: one that is answered 401 or 403 leaves the turn to the next.

use std::collections::BTreeMap;

use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::{Destination, Failure, Registries, SelectionRequest, Sources, SyncRequest, in_order};
use crate::{
    auth::{Credential, CredentialStore, Entry},
    copy::CopyError,
    oci::{Host, RepositoryName},
    reason::Reason,
    registry::{Access, Client, Error, ErrorKind, Probe, Repository, Sessions, Side, Step, Vendor},
};

/// What is known of the logins of a mirror.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Check {
    /// Every repository that is read, then every one that is written.
    pub repositories: Vec<RepositoryCheck>,
}

/// What is known of the logins for one repository.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RepositoryCheck {
    /// `host/repository`.
    pub repository: String,
    /// Whether it is written, too.
    pub is_target: bool,
    /// The tag or digest that was looked up; where none is known beforehand, the tags were listed.
    pub looked_up: Option<String>,
    /// The entries that match, in the order in which a run tries them.
    pub logins: Vec<Login>,
    /// Entries that do not match.
    pub other_entries: Vec<String>,
    /// What the registry asked for.
    pub asked_for: Vec<String>,
    /// What the token grants here, where it says so.
    pub granted: Option<Vec<String>>,
    /// Whether a pull would work, where that was found out.
    pub pull: Option<bool>,
    /// Whether a push would, where it is wanted and was found out.
    pub push: Option<bool>,
    /// What was found, in words.
    pub found: Option<String>,
    /// Why a sync would fail, and what to do.
    pub failure: Option<Failure>,
    /// What is written about this registry, if it is a known one.
    pub guide: Option<String>,
}

/// An entry that matches.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Login {
    /// Where it is written, such as `Secret "pull"`.
    pub origin: String,
    /// The key that it is written under.
    pub entry: String,
    /// What it is: whose, or of which kind.
    pub shape: String,
    /// What came of it.
    pub outcome: Outcome,
    /// What the registry said to it.
    pub refusal: Option<String>,
}

/// What came of a login.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Outcome {
    /// It is the one that a run would use.
    Used,
    /// The registry does not take it for this, and it is the next one's turn.
    Refused,
    /// The registry asks for none.
    NotAskedFor,
    /// It was not its turn.
    Untried,
}

impl Check {
    /// The repositories that a sync would fail at.
    pub fn failed(&self) -> impl Iterator<Item = &RepositoryCheck> {
        self.repositories.iter().filter(|repository| repository.failure.is_some())
    }
}

/// Repositories that nothing is asked about, and why: a Secret is missing, for one.
#[derive(Clone, Debug, Default)]
pub struct Blocked {
    /// Those that are read.
    pub sources: BTreeMap<(Host, RepositoryName), Failure>,
    /// Those that are written.
    pub targets: BTreeMap<RepositoryName, Failure>,
}

/// Tries the logins of every repository. `None` if `cancel` came first.
pub async fn check(
    client: &Client,
    request: &SyncRequest,
    selections: &[SelectionRequest],
    (registries, blocked): (&Registries, &Blocked),
    cancel: &CancellationToken,
) -> Option<Check> {
    let sessions = Sessions::default();
    let places = places(request, selections, registries, blocked);
    let repositories =
        cancel.run_until_cancelled(in_order(places.iter().map(|place| place.check(client, &sessions)))).await;
    sessions.clean_up().await;
    Some(Check { repositories: repositories? })
}

/// A repository, and what a run would begin with there.
struct Place<'a> {
    access: &'a Access,
    name: RepositoryName,
    side: Side,
    reference: Option<String>,
    blocked: Option<Failure>,
}

fn places<'a>(
    request: &SyncRequest,
    selections: &[SelectionRequest],
    registries: &'a Registries,
    blocked: &Blocked,
) -> Vec<Place<'a>> {
    let mut sources: BTreeMap<(Host, RepositoryName), Option<String>> = BTreeMap::new();
    let mut targets: BTreeMap<RepositoryName, Option<String>> = BTreeMap::new();
    for image in &request.images {
        let source = (image.source.host.clone(), image.source.repository.clone());
        sources.entry(source).or_insert_with(|| Some(image.source.wanted()));
        targets.entry(image.target_repository.clone()).or_insert_with(|| Some(image.target_tag.to_string()));
    }
    for selection in selections {
        sources.entry((selection.host.clone(), selection.repository.clone())).or_default();
        targets.entry(selection.target_repository.clone()).or_default();
    }
    let mut places = Vec::new();
    if let Sources::Registries(accesses) = &registries.sources {
        places.extend(sources.into_iter().filter_map(|(place, reference)| {
            let (access, blocked) = (accesses.get(&place.0)?, blocked.sources.get(&place).cloned());
            Some(Place { access, name: place.1, side: Side::Source, reference, blocked })
        }));
    }
    if let Destination::Registry(access) = &registries.target {
        places.extend(targets.into_iter().map(|(name, reference)| {
            let blocked = blocked.targets.get(&name).cloned();
            Place { access, name, side: Side::Target, reference, blocked }
        }));
    }
    places
}

/// What came of one login.
struct Attempt {
    asked_for: Vec<String>,
    granted: Option<Vec<String>>,
    pull: Result<Probe, Error>,
    push: Option<Result<(), Error>>,
}

impl Place<'_> {
    async fn check(&self, client: &Client, sessions: &Sessions) -> RepositoryCheck {
        let Access { host, credentials, .. } = self.access;
        let entries = credentials.entries_for(host, &self.name);
        let mut found = self.untried(&entries);
        if let Some(blocked) = &self.blocked {
            found.failure = Some(blocked.clone());
            return found;
        }
        let mut stores: Vec<CredentialStore> = entries.into_iter().map(CredentialStore::only).collect();
        if stores.is_empty() {
            stores.push(CredentialStore::default());
        }
        let last = stores.len() - 1;
        for (at, store) in stores.into_iter().enumerate() {
            let access = Access { credentials: store, ..self.access.clone() };
            let attempt = match self.attempt(client, &access, sessions).await {
                Ok(attempt) => attempt,
                Err(error) => {
                    found.failure = Some(self.failure(error));
                    return found;
                }
            };
            let refusal = attempt.error().filter(|error| is_refusal(error)).map(ToString::to_string);
            if let Some(login) = found.logins.get_mut(at) {
                login.outcome = match attempt.error() {
                    _ if refusal.is_some() => Outcome::Refused,
                    // Nobody was there to be shown it.
                    Some(error) if error.status().is_none() => Outcome::Untried,
                    _ if attempt.asked_for.is_empty() => Outcome::NotAskedFor,
                    _ => Outcome::Used,
                };
                login.refusal.clone_from(&refusal);
            }
            if refusal.is_none() || at == last {
                self.conclude(&mut found, attempt);
                break;
            }
        }
        found
    }

    fn untried(&self, entries: &[&Entry]) -> RepositoryCheck {
        let is_other = |entry: &&Entry| !entries.iter().any(|found| std::ptr::eq(*found, *entry));
        let others = self.access.credentials.entries().iter().filter(is_other);
        RepositoryCheck {
            repository: format!("{}/{}", self.access.host, self.name),
            is_target: self.side == Side::Target,
            looked_up: self.reference.clone(),
            logins: entries.iter().map(|entry| Login::of(entry)).collect(),
            other_entries: others.map(in_words).collect(),
            asked_for: Vec::new(),
            granted: None,
            pull: None,
            push: None,
            found: None,
            failure: None,
            guide: Vendor::of(&self.access.host).map(|vendor| format!("docs/registries/{}", vendor.page)),
        }
    }

    async fn attempt(&self, client: &Client, access: &Access, sessions: &Sessions) -> Result<Attempt, Error> {
        let name = self.name.clone();
        let repository = match self.side {
            Side::Source => Repository::for_pull(client, access, name)?,
            Side::Target => Repository::for_push(client, access, name)?,
        };
        let pull = match repository.try_pull(self.reference.as_deref()).await {
            // A target that is not there yet has no tags.
            Err(error) if self.side == Side::Target && error.is_not_found() => Ok(Probe::Absent),
            pull => pull,
        };
        let push = match (self.side, &pull) {
            (Side::Target, Ok(_)) => Some(repository.try_push(sessions).await),
            _ => None,
        };
        // Somebody who gave no token is not asked for another one.
        let has_token = !matches!(&pull, Err(error) if matches!(error.step, Step::Token | Step::Login));
        let granted = if has_token { repository.granted().await.ok().flatten() } else { None };
        Ok(Attempt { asked_for: repository.asked_for(), granted, pull, push })
    }

    fn conclude(&self, found: &mut RepositoryCheck, attempt: Attempt) {
        let Attempt { asked_for, granted, pull, push } = attempt;
        let lacks =
            |action: &str| granted.as_ref().is_some_and(|granted| !granted.iter().any(|grant| allows(grant, action)));
        // A token that was given and grants less says more than the answer to it.
        let action = if push.is_some() { "push" } else { "pull" };
        let of = |error: Error| {
            if is_refusal(&error) && lacks(action) {
                let advice = format!("grant the credential the right to {action}, or name another Secret");
                return Failure::new(error.reason(self.side), &format!("{error}; {advice}"));
            }
            self.failure(error)
        };
        found.pull = Some(pull.is_ok());
        found.push = push.as_ref().map(Result::is_ok);
        let is_target = self.side == Side::Target;
        found.found = match (&pull, &self.reference) {
            (Ok(Probe::Digest(digest)), Some(reference)) => Some(format!("{reference} is {digest}")),
            (Ok(Probe::Absent), Some(reference)) if is_target => Some(format!("{reference} is not there yet")),
            (Ok(Probe::Absent), Some(reference)) => Some(format!("{reference} is not there")),
            (Ok(Probe::Listed), _) => Some("the tags can be listed".to_owned()),
            (Ok(_), None) => Some("it is not there yet".to_owned()),
            (Err(_), _) => None,
        };
        found.failure = match (pull, push) {
            (Err(error), _) | (_, Some(Err(error))) => Some(of(error)),
            (Ok(Probe::Absent), _) if !is_target => {
                let what = format!("{} does not exist", self.looked_up());
                Some(Failure::new(
                    Reason::SourceNotFound,
                    &format!("{what}; check the name and the tag in spec.images"),
                ))
            }
            _ => None,
        };
        (found.asked_for, found.granted) = (asked_for, granted);
    }

    fn looked_up(&self) -> String {
        let reference = self.reference.as_deref().unwrap_or_default();
        let separator = if reference.contains(':') { '@' } else { ':' };
        format!("{}/{}{separator}{reference}", self.access.host, self.name)
    }

    fn failure(&self, error: Error) -> Failure {
        let error = match self.side {
            Side::Source => CopyError::source(error),
            Side::Target => CopyError::target(error),
        };
        Failure::new(error.reason(), &error.message())
    }
}

impl Attempt {
    fn error(&self) -> Option<&Error> {
        let push = self.push.as_ref().and_then(|push| push.as_ref().err());
        self.pull.as_ref().err().or(push)
    }
}

/// Whether a grant in words has this among its actions.
fn allows(grant: &str, action: &str) -> bool {
    let actions = grant.rsplit(':').next().unwrap_or_default();
    actions.split(',').any(|granted| granted == action || granted == "*")
}

fn is_refusal(error: &Error) -> bool {
    matches!(&error.kind, ErrorKind::Status { status, .. } if matches!(status.as_u16(), 401 | 403))
}

fn in_words(entry: &Entry) -> String {
    format!("{}, entry {:?}", entry.credential().origin(), entry.key())
}

impl Login {
    fn of(entry: &Entry) -> Self {
        let credential = entry.credential();
        Self {
            origin: credential.origin().to_owned(),
            entry: entry.key().to_owned(),
            shape: shape(credential),
            outcome: Outcome::Untried,
            refusal: None,
        }
    }
}

/// What tokens begin with that people take for user names.
const TOKENS: [&str; 8] = ["ghp_", "gho_", "ghu_", "ghs_", "github_pat_", "glpat-", "dckr_", "eyJ"];

/// What a credential is, without what is secret in it.
fn shape(credential: &Credential) -> String {
    let user = credential.username();
    match () {
        () if credential.as_identity_token().is_some() => "an identity token".to_owned(),
        () if credential.exchange().is_some() => "an identity that is exchanged for a login".to_owned(),
        () if user.is_empty() => "a token without a user name".to_owned(),
        () if user.len() > 80 || TOKENS.iter().any(|token| user.starts_with(token)) => {
            "a user name that looks like a token".to_owned()
        }
        () => format!("user {user:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_that_stand_where_a_name_does_are_not_shown() {
        for (user, shown) in [
            ("robot$team+push", "user \"robot$team+push\""),
            ("eyal", "user \"eyal\""),
            ("", "a token without a user name"),
            ("<token>", "an identity token"),
            ("ghp_hunter2", "a user name that looks like a token"),
            ("eyJhbGciOi", "a user name that looks like a token"),
        ] {
            assert_eq!(shape(&Credential::new(user.to_owned(), "p".into(), "x")), shown);
        }
    }

    #[test]
    fn a_grant_is_read_to_its_last_colon() {
        assert!(allows("repository:host:1/a:pull,push", "push") && allows("repository:a:*", "push"));
        assert!(!allows("repository:push:pull", "push"));
    }
}
