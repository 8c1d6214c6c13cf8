//! One image: what the target has, what is wanted, and what brings the two in step, in the fewest requests.

use std::sync::Arc;

use super::{
    Failure, ImageRequest, SyncRequest,
    handles::{Handles, TargetHandle},
};
use crate::{
    copy::{CopyError, Expected, Root, Run, copy, copy_attached, may_have_attached},
    oci::{Digest, RawManifest, Tag},
    plan::{Action, Overwrite, Step, plan},
    reason::Reason,
    registry::{Error, Side, Source},
};

/// What an image came to.
pub(super) struct Outcome {
    pub(super) digest: Digest,
    pub(super) source_digest: Digest,
    pub(super) action: Action,
    /// What the tag had, where it was written or left.
    pub(super) replaced: Option<Digest>,
}

/// What an image failed of, before it is put into words.
pub(super) enum ImageError {
    Setup(Arc<Error>, Side),
    Copy(CopyError),
    NotFound(String),
    /// Others write the tag as often as it is restored.
    Contested(Digest),
    Unprepared,
}

impl From<CopyError> for ImageError {
    fn from(error: CopyError) -> Self {
        Self::Copy(error)
    }
}

impl ImageError {
    pub(super) fn into_failure(self) -> Failure {
        match self {
            Self::Setup(error, side) => Failure::new(error.reason(side), &error.to_string()),
            Self::Copy(error) => Failure::new(error.reason(), &error.message()),
            Self::NotFound(message) => Failure::new(Reason::SourceNotFound, &message),
            Self::Contested(present) => {
                let what = format!(
                    "the tag has {present}, which was not written here, and was restored several times of late"
                );
                let message = format!("{what}: somebody else writes it too; let one of the two write another tag");
                Failure::new(Reason::TargetChanged, &message)
            }
            Self::Unprepared => {
                Failure::new(Reason::InternalError, "the source registry was not prepared for this run")
            }
        }
    }
}

/// What the source has under the wanted name, read as far as it was needed.
#[derive(Clone)]
enum Wanted {
    Digest(Digest),
    Manifest(RawManifest),
}

impl Wanted {
    fn digest(&self) -> &Digest {
        match self {
            Self::Digest(digest) => digest,
            Self::Manifest(manifest) => &manifest.digest,
        }
    }

    async fn manifest(self, source: &Source) -> Result<RawManifest, CopyError> {
        match self {
            Self::Digest(digest) => source.manifest(&digest.to_string()).await.map_err(CopyError::source),
            Self::Manifest(manifest) => Ok(manifest),
        }
    }
}

/// What is to be done with an image, and what was read to find that out.
pub(super) struct Planned<'a> {
    pub(super) step: Step,
    /// The digest at the source that the wanted one is made of.
    pub(super) source_digest: Digest,
    /// What the target's tag has.
    pub(super) present: Option<Digest>,
    pub(super) source: &'a Source,
    pub(super) target: &'a TargetHandle,
    tag: Tag,
    wanted: Wanted,
    root: Option<Root>,
}

impl Planned<'_> {
    /// What is to be copied.
    pub(super) async fn root(&mut self, image: &ImageRequest) -> Result<&Root, CopyError> {
        let root = match self.root.take() {
            Some(root) => root,
            None => read(self.wanted.clone(), image, self.source).await?,
        };
        Ok(self.root.insert(root))
    }
}

/// Finds out what is to be done with an image.
pub(super) async fn plan_image<'a>(
    request: &SyncRequest,
    image: &ImageRequest,
    handles: &'a Handles<'_>,
) -> Result<Planned<'a>, ImageError> {
    let source = handles.source(image).ok_or(ImageError::Unprepared)?;
    let source = source.as_ref().map_err(|error| ImageError::Setup(Arc::clone(error), Side::Source))?;
    let target = handles.target(image).ok_or(ImageError::Unprepared)?;
    let target = target.as_ref().map_err(|error| ImageError::Setup(Arc::clone(error), Side::Target))?;
    let (_, _, tag) = handles.destination().place_of(image);

    let (present, wanted) = look(image, source, target, &tag).await?;
    let source_digest = wanted.digest().clone();
    // What the digest is with these platforms is known from the last time, or found by rewriting the index.
    let known = match &image.last {
        _ if image.platforms.is_empty() => Some(source_digest.clone()),
        Some(last) if last.source_digest.as_ref() == Some(&source_digest) => Some(last.digest.clone()),
        _ => None,
    };
    let (digest, root) = match known {
        Some(digest) => (digest, None),
        None => {
            let root = read(wanted.clone(), image, source).await?;
            (root.manifest.digest.clone(), Some(root))
        }
    };
    let present = in_algorithm_of(&digest, present, target, &tag).await?;
    let last = image.last.as_ref();
    let step = plan(request.policy, &digest, present.as_ref(), last.map(|last| &last.digest));
    if step.wanted == digest {
        return Ok(Planned { step, source_digest, present, source, target, tag, wanted, root });
    }
    // What is kept was made of what the source had then.
    let made_of = last.and_then(|last| last.source_digest.clone()).unwrap_or_else(|| step.wanted.clone());
    let wanted = Wanted::Digest(made_of.clone());
    Ok(Planned { step, source_digest: made_of, present, source, target, tag, wanted, root: None })
}

pub(super) async fn sync_image(
    run: &Run,
    request: &SyncRequest,
    image: &ImageRequest,
    handles: &Handles<'_>,
) -> Result<Outcome, ImageError> {
    let mut planned = plan_image(request, image, handles).await?;
    let Planned { source, target, .. } = planned;
    let options = &request.options;
    let (action, source_digest) = (planned.step.action, planned.source_digest.clone());
    let replaced = planned.present.clone().filter(|present| *present != planned.step.wanted);
    if let (true, Action::Restore, Some(present)) = (image.is_contested, action, &replaced) {
        return Err(ImageError::Contested(present.clone()));
    }
    let outcome = Outcome { digest: planned.step.wanted.clone(), source_digest, action, replaced };
    if action.writes() {
        let (tag, present) = (planned.tag.clone(), planned.present.clone());
        let expected =
            if request.policy.overwrite == Overwrite::Always { Expected::Anything } else { Expected::Still(present) };
        let root = planned.root(image).await?;
        let copied = copy(run, source, &target.repository, root, (&tag, &expected), options).await;
        return match copied {
            Ok(()) => Ok(outcome),
            // Somebody was faster: the policy is about what is there now.
            Err(CopyError::TargetChanged) => Ok(Outcome { action: Action::Leave, ..outcome }),
            Err(error) => Err(explained(error, source, root, &tag).await.into()),
        };
    }
    let looks = request.looks_at_attached && action != Action::Leave;
    if looks && may_have_attached(run, source, &outcome.source_digest, options).await? {
        let root = planned.root(image).await?;
        copy_attached(run, source, &target.repository, root, options).await?;
    }
    Ok(outcome)
}

/// What the target's refusal of a manifest means, by a look at the manifest.
async fn explained(error: CopyError, source: &Source, root: &Root, tag: &Tag) -> CopyError {
    let Some(reference) = error.refused_manifest() else { return error };
    let manifest = if reference == tag.as_str() {
        Some(root.manifest.clone())
    } else {
        // A tag of something attached, or of a rewritten index, is not there.
        source.manifest(reference).await.ok()
    };
    match manifest {
        Some(manifest) => error.about(&manifest),
        None => error,
    }
}

/// What is copied: all of it, or some platforms.
async fn read(wanted: Wanted, image: &ImageRequest, source: &Source) -> Result<Root, CopyError> {
    let manifest = wanted.manifest(source).await?;
    if image.platforms.is_empty() {
        return Ok(Root::whole(manifest));
    }
    Root::subset(source, manifest, &image.platforms).await
}

/// What the target has and what is wanted, in the fewest requests: a pinned digest needs the target's HEAD alone; a
/// tag that is expected to be there, as it was after the last run or as others of the repository are, a HEAD on each side
/// at once; one that is not there no HEAD at the source, because the GET that must follow gives the digest.
async fn look(
    image: &ImageRequest,
    source: &Source,
    target: &TargetHandle,
    target_tag: &Tag,
) -> Result<(Option<Digest>, Wanted), ImageError> {
    if let Some(digest) = &image.source.digest {
        let present = target.digest_of(target_tag).await.map_err(CopyError::target)?;
        return Ok((present, Wanted::Digest(digest.clone())));
    }
    let tag = image.source.wanted();
    let at_source = async {
        let found = match source.head(&tag).await.map_err(CopyError::source)? {
            Some(digest) => Some(digest),
            // Some registries deny to have what they give all the same.
            None => match source.manifest(&tag).await {
                Ok(manifest) => Some(manifest.digest),
                Err(error) if error.is_not_found() => None,
                Err(error) => return Err(CopyError::source(error).into()),
            },
        };
        found.ok_or_else(|| {
            let what = format!("{}:{tag} does not exist", source.place());
            ImageError::NotFound(format!(
                "{what}; check the name and the tag in spec.images; a copy at the target stays"
            ))
        })
    };
    if image.last.is_some() || target.is_likely_complete() {
        let at_target = async { target.repository.head(target_tag.as_str()).await.map_err(CopyError::target) };
        let (present, wanted) = futures::future::join(at_target, at_source).await;
        return Ok((present?, Wanted::Digest(wanted?)));
    }
    let present = target.digest_of(target_tag).await.map_err(CopyError::target)?;
    if present.is_some() {
        return Ok((present, Wanted::Digest(at_source.await?)));
    }
    Ok((None, Wanted::Manifest(source.manifest(&tag).await.map_err(CopyError::source)?)))
}

/// The digest that the target's tag has, in the algorithm of the wanted one. A registry names its own: it is then
/// computed from the manifest.
async fn in_algorithm_of(
    wanted: &Digest,
    present: Option<Digest>,
    target: &TargetHandle,
    tag: &Tag,
) -> Result<Option<Digest>, CopyError> {
    match present {
        Some(present) if present.algorithm() != wanted.algorithm() => {
            let manifest = target.repository.manifest(tag.as_str()).await.map_err(CopyError::target)?;
            Ok(Some(Digest::of(wanted.algorithm(), &manifest.bytes)))
        }
        present => Ok(present),
    }
}
