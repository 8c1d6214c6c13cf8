//! One sync: the entry that the operator and the command line share.
//!
//! [`sync`] takes plain values that name what goes where, and gives plain values back that say what happened. How
//! registries are reached and with which credentials is a separate argument ([`Registries`]), so that requests and
//! reports can be stored and sent without a secret in them. One failed image never stops another.

mod check;
mod choose;
mod handles;
mod image;
mod preview;

pub use check::{Blocked, Check, Login, Outcome as LoginOutcome, RepositoryCheck, check};
pub use choose::{SelectionRequest, choose};
pub use preview::{ImagePreview, Preview, preview};

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt as _, stream};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use crate::{
    copy::{CopyOptions, Counter, Fence, Progress, Run, Totals},
    oci::{Digest, Host, PlatformFilter, Reference, RepositoryName, Tag},
    plan::{Action, Policy},
    reason::Reason,
    registry::{Access, Client, Layout},
};
use handles::Handles;
use image::{ImageError, Outcome, sync_image};

/// Images of one run that are under way at a time. Their requests share the limits of the hosts.
const IMAGES_AT_ONCE: usize = 64;

/// What is to be in step.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SyncRequest {
    /// The images, one for each target tag.
    pub images: Vec<ImageRequest>,
    /// Repositories whose tags could not be chosen from.
    pub unknown: Vec<Unknown>,
    /// How long the whole run may take.
    pub timeout: Duration,
    /// What is copied beside the images themselves.
    pub options: CopyOptions,
    /// What to do where there is a choice.
    pub policy: Policy,
    /// Whether what is attached is looked at also where the image itself has not changed.
    pub looks_at_attached: bool,
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
    /// The platforms that are kept; none named is all.
    pub platforms: Vec<PlatformFilter>,
    /// How it was after the last run, as far as that is known.
    pub last: Option<Last>,
    /// The tag was restored so often of late from what others wrote there that it is left to them.
    pub is_contested: bool,
    /// Why this image fails without a request, such as a missing Secret.
    pub blocked: Option<Failure>,
}

/// A repository whose images are not known, because its tags could not be chosen from.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Unknown {
    /// The source, without a tag.
    pub source: String,
    /// The target, without a tag.
    pub target: String,
    /// Why.
    pub failure: Failure,
}

/// How an image was after a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Last {
    /// The digest that the tag had at the target.
    pub digest: Digest,
    /// The digest at the source that this was made of, if it was made of these platforms.
    pub source_digest: Option<Digest>,
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

/// Where the images are and where they go.
#[derive(Clone, Debug)]
pub struct Registries {
    /// Where they come from.
    pub sources: Sources,
    /// Where they go.
    pub target: Destination,
}

impl Registries {
    /// The registries among them.
    pub fn accesses_mut(&mut self) -> impl Iterator<Item = &mut Access> {
        let sources = match &mut self.sources {
            Sources::Registries(accesses) => Some(accesses.values_mut()),
            Sources::Layout(_) => None,
        };
        let target = match &mut self.target {
            Destination::Registry(access) => Some(access),
            Destination::Layout(_) => None,
        };
        sources.into_iter().flatten().chain(target)
    }
}

/// Where images come from.
#[derive(Clone, Debug)]
pub enum Sources {
    /// From registries, by host.
    Registries(BTreeMap<Host, Access>),
    /// From a directory that holds them under the names that they have at their registries.
    Layout(Layout),
}

/// Where images go.
#[derive(Clone, Debug)]
pub enum Destination {
    /// To a registry.
    Registry(Access),
    /// To a directory, under the names that they have at their registries.
    Layout(Layout),
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
    /// The digest at the source; it differs from `digest` where platforms were selected.
    pub source_digest: Option<Digest>,
    /// What had to be done.
    pub action: Option<Action>,
    /// The digest that the target tag had, where it was written or left.
    pub replaced: Option<Digest>,
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
    /// The images whose target tag has a digest that the policy leaves.
    pub fn left(&self) -> impl Iterator<Item = &ImageReport> {
        self.images.iter().filter(|image| image.action == Some(Action::Leave))
    }

    /// The images that failed.
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

/// Who follows a run image by image: nobody in the operator, a terminal on the command line.
pub trait Watch: Sync {
    /// An image is begun. What is given back counts its bytes.
    fn began(&self, image: &ImageReport) -> Option<Arc<Counter>>;
    /// An image is finished, well or not.
    fn ended(&self, image: &ImageReport);
}

impl Watch for () {
    fn began(&self, _: &ImageReport) -> Option<Arc<Counter>> {
        None
    }

    fn ended(&self, _: &ImageReport) {}
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
    sync_watched(client, request, registries, fence, progress, &(), cancel).await
}

/// The same, and `watch` follows it.
pub async fn sync_watched(
    client: &Client,
    request: &SyncRequest,
    registries: &Registries,
    fence: Fence,
    progress: Arc<Progress>,
    watch: &dyn Watch,
    cancel: &CancellationToken,
) -> Option<SyncReport> {
    let started_at = Timestamp::now();
    progress.expect_images(request.images.len() as u64);
    let run = Run::new(Arc::clone(&progress), fence, client.memory().clone());
    let deadline = Instant::now() + request.timeout;
    let handles = Handles::of(client, request, registries);
    let one = async |image: &ImageRequest| {
        let ImageSource { host, repository, .. } = &image.source;
        let span = tracing::info_span!("image", source = %format_args!("{host}/{repository}"), tag = %image.target_tag);
        let report = ImageReport::of(image, handles.destination());
        let run = run.of_image(watch.began(&report));
        let report = image_report(&run, request, image, report, &handles, deadline).instrument(span).await;
        progress.image_done();
        watch.ended(&report);
        report
    };
    let images = cancel.run_until_cancelled(in_order(request.images.iter().map(one))).await;
    run.clean_up().await;
    let images = images?.into_iter();
    let unknown = request.unknown.iter().map(ImageReport::of_unknown).inspect(|report| watch.ended(report));
    let images = images.chain(unknown).collect();
    Some(SyncReport { started_at, finished_at: Timestamp::now(), images, totals: run.totals() })
}

async fn image_report(
    run: &Run,
    request: &SyncRequest,
    image: &ImageRequest,
    mut report: ImageReport,
    handles: &Handles<'_>,
    deadline: Instant,
) -> ImageReport {
    match unless_blocked(request, image, deadline, Box::pin(sync_image(run, request, image, handles))).await {
        Ok(Outcome { digest, source_digest, action, replaced }) => {
            if action.writes() {
                tracing::info!(source = %report.source, tag = %report.tag, target = %report.target, %digest, ?action, "image copied");
            } else {
                tracing::debug!(source = %report.source, tag = %report.tag, target = %report.target, %digest, ?action, "image left as it is");
            }
            // Where the target is left with another digest, what was known of it stays as it was.
            if action != Action::Leave {
                report.digest = Some(digest);
                report.source_digest = Some(source_digest);
            }
            report.action = Some(action);
            report.replaced = replaced;
        }
        Err(failure) => {
            tracing::warn!(
                source = %report.source, tag = %report.tag, target = %report.target,
                reason = %failure.reason, error = %failure.message, "image failed"
            );
            report.failure = Some(failure);
        }
    }
    report
}

/// What many futures come to, in the order in which they were given. They go on side by side, and one that takes long does
/// not hold up those behind it.
async fn in_order<F: Future>(futures: impl Iterator<Item = F>) -> Vec<F::Output> {
    let numbered: Vec<_> = futures.enumerate().map(|(number, one)| async move { (number, one.await) }).collect();
    let mut done: Vec<_> = stream::iter(numbered).buffer_unordered(IMAGES_AT_ONCE).collect().await;
    done.sort_by_key(|(number, _)| *number);
    done.into_iter().map(|(_, output)| output).collect()
}

/// What `work` on an image comes to, if nothing blocks the image and the time of the run is enough. Pinned in a box, made
/// when it is the image's turn: what waits for its turn, thousands of images perhaps, takes no room for it.
async fn unless_blocked<T>(
    request: &SyncRequest,
    image: &ImageRequest,
    deadline: Instant,
    work: Pin<Box<impl Future<Output = Result<T, ImageError>>>>,
) -> Result<T, Failure> {
    if let Some(failure) = &image.blocked {
        return Err(failure.clone());
    }
    match timeout_at(deadline, work).await {
        Ok(outcome) => outcome.map_err(ImageError::into_failure),
        Err(_) => {
            let message = format!("the run took longer than spec.timeout ({}s)", request.timeout.as_secs());
            Err(Failure { reason: Reason::Timeout, message })
        }
    }
}

impl SyncReport {
    /// This report of some of the images, completed by an earlier one of all of them. `due` are those, by their targets,
    /// that it was about: what is not found again among them is wanted no more.
    #[must_use]
    pub fn completing(self, earlier: &Self, due: &BTreeSet<String>) -> Self {
        let images = earlier.images.iter().map(ImageReport::unchanged).collect();
        let earlier = Self { started_at: self.started_at, images, totals: Totals::default(), ..earlier.clone() };
        earlier.followed_by(self, due)
    }

    /// This report, and what a second look within the same run came to. `due` are the targets that it was about.
    #[must_use]
    pub fn followed_by(self, again: Self, due: &BTreeSet<String>) -> Self {
        let mut news: HashMap<_, ImageReport> = again.images.into_iter().map(|image| (image.key(), image)).collect();
        let kept = self.images.into_iter().filter_map(|image| match news.remove(&image.key()) {
            Some(image) => Some(image),
            None if due.contains(&image.target) => None,
            None => Some(image),
        });
        let mut images: Vec<ImageReport> = kept.collect();
        let mut found: Vec<ImageReport> = news.into_values().collect();
        found.sort_by(|a, b| a.target.cmp(&b.target));
        images.extend(found);
        Self { images, finished_at: again.finished_at, totals: self.totals + again.totals, ..self }
    }
}

impl ImageReport {
    /// The source with its tag or digest, as people write it.
    #[must_use]
    pub fn name(&self) -> String {
        match self.tag.as_str() {
            "" => self.source.clone(),
            digest if digest.contains(':') => format!("{}@{digest}", self.source),
            tag => format!("{}:{tag}", self.source),
        }
    }

    /// What tells images of one report apart: two may want one target tag.
    fn key(&self) -> [String; 3] {
        [self.target.clone(), self.source.clone(), self.tag.clone()]
    }

    /// Of an image that nothing is known of yet.
    #[must_use]
    pub fn of(image: &ImageRequest, destination: &Destination) -> Self {
        Self {
            source: format!("{}/{}", image.source.host, image.source.repository),
            tag: image.source.tag.as_ref().map_or_else(|| image.source.wanted(), ToString::to_string),
            target: destination.target_of(image),
            digest: None,
            source_digest: None,
            action: None,
            replaced: None,
            failure: None,
            is_news: true,
        }
    }

    fn of_unknown(unknown: &Unknown) -> Self {
        tracing::warn!(
            source = %unknown.source, target = %unknown.target,
            reason = %unknown.failure.reason, error = %unknown.failure.message, "tags cannot be chosen"
        );
        Self {
            source: unknown.source.clone(),
            tag: String::new(),
            target: unknown.target.clone(),
            digest: None,
            source_digest: None,
            action: None,
            replaced: None,
            failure: Some(unknown.failure.clone()),
            is_news: true,
        }
    }

    /// The same image in a run that did not look at it.
    fn unchanged(&self) -> Self {
        Self {
            action: self.action.map(|action| if action.writes() { Action::Unchanged } else { action }),
            is_news: false,
            ..self.clone()
        }
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
            source_digest: None,
            action: (!failed).then_some(Action::Copy),
            replaced: None,
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
        let due = ["b".to_owned(), "d".to_owned()].into();
        let earlier = report(&[("a", false), ("b", true), ("c", true), ("d", true)]);
        let whole = report(&[("b", false), ("d:2", false), ("d:1", false)]).completing(&earlier, &due);
        let targets: Vec<_> = whole.images.iter().map(|image| (image.target.as_str(), image.action)).collect();
        let (copied, unchanged) = (Some(Action::Copy), Some(Action::Unchanged));
        assert_eq!(targets, [("a", unchanged), ("b", copied), ("c", None), ("d:1", copied), ("d:2", copied)]);
        assert_eq!(whole.failed().count(), 1);
    }
}
