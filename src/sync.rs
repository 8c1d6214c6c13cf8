//! One sync: the entry that the operator and the command line share.
//!
//! [`sync`] takes plain values that name what goes where, and gives plain values back that say what happened. How
//! registries are reached and with which credentials is a separate argument ([`Registries`]), so that requests and
//! reports can be stored and sent without a secret in them. One failed image never stops another.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt as _, stream};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::{
    copy::{CopyError, Fence, Progress, Run, Totals, copy},
    oci::{Digest, Host, RawManifest, Reference, RepositoryName, Tag},
    plan::{Action, plan},
    reason::Reason,
    registry::{Access, Client, Error, Repository},
};

/// Images of one run that are under way at a time. Their requests share the limits of the hosts.
const IMAGES_AT_ONCE: usize = 16;

/// What is to be in step.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SyncRequest {
    /// The images, one for each target tag.
    pub images: Vec<ImageRequest>,
    /// How long the whole run may take.
    pub timeout: Duration,
}

/// One image and where it goes.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ImageRequest {
    /// Where it comes from.
    pub source: ImageSource,
    /// The repository at the target.
    pub target_repository: RepositoryName,
    /// The tag at the target.
    pub target_tag: Tag,
    /// The digest that the tag had after the last run, as far as that is known.
    pub last: Option<Digest>,
    /// Why this image fails without a request, such as a missing Secret.
    pub blocked: Option<Failure>,
}

/// A tag, or a digest that no tag is followed for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ImageSource {
    /// The registry.
    pub host: Host,
    /// The repository.
    pub repository: RepositoryName,
    /// The tag to follow.
    pub tag: Option<Tag>,
    /// The digest to copy; then the tag is not looked at.
    pub digest: Option<Digest>,
}

/// How the registries are reached.
#[derive(Clone, Debug)]
pub struct Registries {
    /// The sources, by host.
    pub sources: BTreeMap<Host, Access>,
    /// The target.
    pub target: Access,
}

/// What a run came to.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SyncReport {
    /// When it began.
    pub started_at: Timestamp,
    /// When it ended.
    pub finished_at: Timestamp,
    /// Every image of the request, in its order.
    pub images: Vec<ImageReport>,
    /// What was moved.
    pub totals: Totals,
}

/// What one image came to.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ImageReport {
    /// The source without its tag.
    pub source: String,
    /// The tag or digest at the source.
    pub tag: String,
    /// The target with its tag.
    pub target: String,
    /// The digest that the target tag has now, if it is the wanted one.
    pub digest: Option<Digest>,
    /// What had to be done.
    pub action: Option<Action>,
    /// Why it is not in step.
    pub failure: Option<Failure>,
    /// Whether this run looked at it; else what is said here is from an earlier one.
    #[serde(skip)]
    pub is_news: bool,
}

/// Why an image is not in step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    /// The reason, of the closed list.
    pub reason: Reason,
    /// What happened, where, and what to do.
    pub message: String,
}

/// Longer messages are cut: parts of them are what a registry sent.
const MAX_MESSAGE: usize = 640;

impl Failure {
    /// A failure whose message has no control characters and at most 640 characters.
    #[must_use]
    pub fn new(reason: Reason, message: &str) -> Self {
        let printable = message.chars().map(|c| if c.is_control() { ' ' } else { c });
        Self { reason, message: printable.take(MAX_MESSAGE).collect() }
    }
}

impl SyncReport {
    /// The images that are not in step.
    pub fn failed(&self) -> impl Iterator<Item = (&ImageReport, &Failure)> {
        self.images.iter().filter_map(|image| image.failure.as_ref().map(|failure| (image, failure)))
    }
}

impl ImageSource {
    /// The tag or digest to ask the source for.
    fn wanted(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.to_string(),
            (None, None) => String::new(),
        }
    }
}

impl From<Reference> for ImageSource {
    fn from(reference: Reference) -> Self {
        let Reference { host, repository, tag, digest } = reference;
        Self { host, repository, tag, digest }
    }
}

/// Brings the target in step with the sources.
///
/// `None` if `cancel` came first: then what was opened at the target is given up, and no tag is written any more.
pub async fn sync(
    client: &Client,
    request: &SyncRequest,
    registries: &Registries,
    fence: Fence,
    progress: Arc<Progress>,
    cancel: &CancellationToken,
) -> Option<SyncReport> {
    let started_at = Timestamp::now();
    progress.expect_images(request.images.len() as u64);
    let run = Run::new(Arc::clone(&progress), fence);
    let deadline = Instant::now() + request.timeout;
    let repositories = Repositories::of(client, request, registries);
    let one = async |(number, image)| {
        let report = image_report(&run, image, &repositories, registries, deadline, request.timeout).await;
        progress.image_done();
        (number, report)
    };
    let images: Vec<_> = request.images.iter().enumerate().map(one).collect();
    // In the order in which they end: one that takes long does not hold up those behind it.
    let images = stream::iter(images).buffer_unordered(IMAGES_AT_ONCE).collect::<Vec<_>>();
    let images = cancel.run_until_cancelled(images).await;
    run.clean_up().await;
    let mut images = images?;
    images.sort_by_key(|(number, _)| *number);
    let images = images.into_iter().map(|(_, report)| report).collect();
    Some(SyncReport { started_at, finished_at: Timestamp::now(), images, totals: run.totals() })
}

/// The handles of a run: images of one repository share what is learned about its credentials.
struct Repositories {
    sources: HashMap<(Host, RepositoryName), Result<Repository, Arc<Error>>>,
    targets: HashMap<RepositoryName, Result<Repository, Arc<Error>>>,
}

impl Repositories {
    fn of(client: &Client, request: &SyncRequest, registries: &Registries) -> Self {
        let mut this = Self { sources: HashMap::new(), targets: HashMap::new() };
        for ImageRequest { source, target_repository, .. } in &request.images {
            if let Some(access) = registries.sources.get(&source.host) {
                let key = (source.host.clone(), source.repository.clone());
                this.sources.entry(key).or_insert_with(|| {
                    Repository::for_pull(client, access, source.repository.clone()).map_err(Arc::new)
                });
            }
            this.targets.entry(target_repository.clone()).or_insert_with(|| {
                Repository::for_push(client, &registries.target, target_repository.clone()).map_err(Arc::new)
            });
        }
        this
    }
}

async fn image_report(
    run: &Run,
    image: &ImageRequest,
    repositories: &Repositories,
    registries: &Registries,
    deadline: Instant,
    whole: Duration,
) -> ImageReport {
    let source = &image.source;
    let mut report = ImageReport {
        source: format!("{}/{}", source.host, source.repository),
        tag: source.tag.as_ref().map_or_else(|| source.wanted(), ToString::to_string),
        target: format!("{}/{}:{}", registries.target.host, image.target_repository, image.target_tag),
        digest: None,
        action: None,
        failure: None,
        is_news: true,
    };
    let outcome = match &image.blocked {
        Some(failure) => Err(failure.clone()),
        None => match timeout_at(deadline, sync_image(run, image, repositories)).await {
            Ok(outcome) => outcome.map_err(ImageError::into_failure),
            Err(_) => {
                let message = format!("the run took longer than spec.timeout ({}s)", whole.as_secs());
                Err(Failure { reason: Reason::Timeout, message })
            }
        },
    };
    match outcome {
        Ok((digest, action)) => {
            if action != Action::Unchanged {
                tracing::info!(source = %report.source, tag = %report.tag, target = %report.target, %digest, ?action, "image copied");
            }
            report.digest = Some(digest);
            report.action = Some(action);
        }
        Err(failure) => {
            tracing::warn!(
                source = %report.source, tag = %report.tag, target = %report.target,
                reason = %failure.reason, message = %failure.message, "image failed"
            );
            report.failure = Some(failure);
        }
    }
    report
}

/// What an image failed of, before it is put into words.
enum ImageError {
    Setup(Arc<Error>, crate::registry::Side),
    Copy(CopyError),
    NotFound(String),
    Unprepared,
}

impl From<CopyError> for ImageError {
    fn from(error: CopyError) -> Self {
        Self::Copy(error)
    }
}

impl ImageError {
    fn into_failure(self) -> Failure {
        match self {
            Self::Setup(error, side) => Failure::new(error.reason(side), &error.to_string()),
            Self::Copy(error) => Failure::new(error.reason(), &error.message()),
            Self::NotFound(message) => Failure::new(Reason::SourceNotFound, &message),
            Self::Unprepared => {
                Failure::new(Reason::InternalError, "the source registry was not prepared for this run")
            }
        }
    }
}

async fn sync_image(
    run: &Run,
    image: &ImageRequest,
    repositories: &Repositories,
) -> Result<(Digest, Action), ImageError> {
    use crate::registry::Side;
    let key = (image.source.host.clone(), image.source.repository.clone());
    let source = repositories.sources.get(&key).ok_or(ImageError::Unprepared)?;
    let source = source.as_ref().map_err(|error| ImageError::Setup(Arc::clone(error), Side::Source))?;
    let target = repositories.targets.get(&image.target_repository).ok_or(ImageError::Unprepared)?;
    let target = target.as_ref().map_err(|error| ImageError::Setup(Arc::clone(error), Side::Target))?;
    let (present, wanted) = look(image, source, target).await?;
    let (digest, manifest) = match wanted {
        Wanted::Digest(digest) => (digest, None),
        Wanted::Manifest(manifest) => (manifest.digest.clone(), Some(manifest)),
    };
    let action = plan(&digest, present.as_ref(), image.last.as_ref());
    if action == Action::Unchanged {
        return Ok((digest, action));
    }
    let manifest = match manifest {
        Some(manifest) => manifest,
        None => source.manifest(&digest.to_string()).await.map_err(CopyError::source)?,
    };
    copy(run, source, target, &manifest, &image.target_tag).await?;
    Ok((digest, action))
}

/// What the source has under the wanted name, read as far as it was needed.
enum Wanted {
    Digest(Digest),
    Manifest(RawManifest),
}

/// What the target has and what is wanted, in the fewest requests: a pinned digest needs the target's HEAD alone; a
/// tag that is expected to be there a HEAD on each side at once; one that is not there no HEAD at the source, because
/// the GET that must follow gives the digest.
async fn look(
    image: &ImageRequest,
    source: &Repository,
    target: &Repository,
) -> Result<(Option<Digest>, Wanted), ImageError> {
    let at_target = async { target.head(image.target_tag.as_str()).await.map_err(CopyError::target) };
    if let Some(digest) = &image.source.digest {
        return Ok((at_target.await?, Wanted::Digest(digest.clone())));
    }
    let tag = image.source.wanted();
    let at_source = async {
        let found = source.head(&tag).await.map_err(CopyError::source)?;
        found.ok_or_else(|| {
            let what = format!("{}:{tag} does not exist at {}", source.name(), source.host());
            ImageError::NotFound(format!(
                "{what}; check the name and the tag in spec.images; a copy at the target stays"
            ))
        })
    };
    if image.last.is_some() {
        let (present, wanted) = futures::future::join(at_target, at_source).await;
        return Ok((present?, Wanted::Digest(wanted?)));
    }
    let present = at_target.await?;
    if present.is_some() {
        return Ok((present, Wanted::Digest(at_source.await?)));
    }
    Ok((None, Wanted::Manifest(source.manifest(&tag).await.map_err(CopyError::source)?)))
}

impl SyncReport {
    /// This report of some of the images, completed by an earlier one of all of them.
    #[must_use]
    pub fn completing(mut self, earlier: &Self) -> Self {
        let mut news: HashMap<String, ImageReport> =
            std::mem::take(&mut self.images).into_iter().map(|image| (image.target.clone(), image)).collect();
        let merged = earlier.images.iter().map(|image| news.remove(&image.target).unwrap_or_else(|| image.unchanged()));
        self.images = merged.collect();
        self
    }
}

impl ImageReport {
    /// The same image in a run that did not look at it.
    fn unchanged(&self) -> Self {
        Self { action: self.action.map(|_| Action::Unchanged), is_news: false, ..self.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(target: &str, failed: bool) -> ImageReport {
        let failure = failed.then(|| Failure { reason: Reason::SourceUnavailable, message: String::new() });
        ImageReport {
            source: "s".into(),
            tag: "t".into(),
            target: target.into(),
            digest: None,
            action: (!failed).then_some(Action::Copy),
            failure,
            is_news: true,
        }
    }

    fn report(images: &[(&str, bool)]) -> SyncReport {
        SyncReport {
            started_at: Timestamp::UNIX_EPOCH,
            finished_at: Timestamp::UNIX_EPOCH,
            images: images.iter().map(|(target, failed)| image(target, *failed)).collect(),
            totals: Totals::default(),
        }
    }

    #[test]
    fn a_report_of_some_images_is_completed_by_an_earlier_one() {
        let whole = report(&[("b", false)]).completing(&report(&[("a", false), ("b", true), ("c", true)]));
        let targets: Vec<_> = whole.images.iter().map(|image| (image.target.as_str(), image.action)).collect();
        assert_eq!(targets, [("a", Some(Action::Unchanged)), ("b", Some(Action::Copy)), ("c", None)]);
        assert_eq!(whole.failed().count(), 1);
    }
}
