//! What a sync would do, and why: the same decisions, and nothing is written.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
};

use serde::Serialize;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    Failure, ImageReport, ImageRequest, Registries, SyncRequest,
    handles::Handles,
    image::{ImageError, plan_image},
    in_order, unless_blocked,
};
use crate::{
    copy::{Fence, Progress, Run, missing},
    oci::Digest,
    plan::Action,
    registry::Client,
};

/// What a sync would do with each image.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Preview {
    /// Every image of the request, in its order.
    pub images: Vec<ImagePreview>,
}

/// What a sync would do with one image.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ImagePreview {
    /// The source with its tag or digest.
    pub source: String,
    /// The target with its tag.
    pub target: String,
    /// What would be done; none where that cannot be found out.
    pub action: Option<Action>,
    /// Why.
    pub why: String,
    /// The digest that the target's tag has.
    pub present: Option<Digest>,
    /// The digest that it is wanted to have.
    pub wanted: Option<Digest>,
    /// Bytes of blobs that the target's repository does not have; those that several images share are counted once.
    pub bytes: u64,
    /// Why it cannot be found out.
    pub failure: Option<Failure>,
}

impl Preview {
    /// The images of which a sync would write the tag.
    pub fn writes(&self) -> impl Iterator<Item = &ImagePreview> {
        self.images.iter().filter(|image| image.action.is_some_and(Action::writes))
    }
}

/// Finds out what a sync would do. `None` if `cancel` came first.
pub async fn preview(
    client: &Client,
    request: &SyncRequest,
    registries: &Registries,
    cancel: &CancellationToken,
) -> Option<Preview> {
    let run = Run::new(Arc::new(Progress::default()), Fence::Open, client.memory().clone());
    let handles = Handles::of(client, request, registries);
    let counted = Mutex::default();
    let deadline = Instant::now() + request.timeout;
    let one = async |image: &ImageRequest| {
        let found = Box::pin(image_preview(&run, request, image, &handles, &counted));
        let found = unless_blocked(request, image, deadline, found).await;
        ImagePreview::of(ImageReport::of(image, handles.destination()), found)
    };
    let images = cancel.run_until_cancelled(in_order(request.images.iter().map(one))).await?;
    let unknown = request
        .unknown
        .iter()
        .map(|unknown| ImagePreview::of(ImageReport::of_unknown(unknown), Err(unknown.failure.clone())));
    Some(Preview { images: images.into_iter().chain(unknown).collect() })
}

struct Found {
    action: Action,
    present: Option<Digest>,
    wanted: Digest,
    bytes: u64,
}

async fn image_preview(
    run: &Run,
    request: &SyncRequest,
    image: &ImageRequest,
    handles: &Handles<'_>,
    counted: &Mutex<HashSet<(String, Digest)>>,
) -> Result<Found, ImageError> {
    let mut planned = plan_image(request, image, handles).await?;
    let mut bytes = 0;
    if planned.step.action.writes() {
        let (source, target) = (planned.source, &planned.target.repository);
        let root = planned.root(image).await?;
        let blobs = missing(run, source, target, root, &request.options).await?;
        let mut counted = counted.lock().unwrap_or_else(PoisonError::into_inner);
        let new = blobs.into_iter().filter(|blob| counted.insert((target.place(), blob.digest.clone())));
        bytes = new.map(|blob| blob.size).sum();
    }
    Ok(Found { action: planned.step.action, present: planned.present, wanted: planned.step.wanted, bytes })
}

impl ImagePreview {
    fn of(report: ImageReport, found: Result<Found, Failure>) -> Self {
        let nothing = Self {
            source: report.name(),
            target: report.target,
            action: None,
            why: String::new(),
            present: None,
            wanted: None,
            bytes: 0,
            failure: None,
        };
        match found {
            Ok(Found { action, present, wanted, bytes }) => {
                let why = why(action).to_owned();
                Self { action: Some(action), why, present, wanted: Some(wanted), bytes, ..nothing }
            }
            Err(failure) => Self { why: failure.message.clone(), failure: Some(failure), ..nothing },
        }
    }
}

fn why(action: Action) -> &'static str {
    match action {
        Action::Unchanged => "the target has the wanted digest",
        Action::Copy => "the target does not have the tag",
        Action::Update => "the target's tag has another digest",
        Action::Restore => "the target's tag is gone or was changed since the last run",
        Action::Keep => "the tag has moved at the source, and policy.sourceMoved is Keep",
        Action::Leave => "the target's tag has a digest that was not written here, and policy.overwrite leaves it",
    }
}
