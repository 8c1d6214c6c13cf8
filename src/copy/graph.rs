//! The walk: a manifest's children first, then the manifest, what is attached to it, at last the tag.

use std::{
    collections::HashSet,
    sync::{Mutex, PoisonError},
};

use futures::{
    FutureExt as _, TryStreamExt as _,
    future::{BoxFuture, try_join, try_join_all},
    stream,
};

use super::{
    CopyError,
    attached::Attached,
    blob::transfer,
    options::{CopyOptions, Expected, ForeignLayers},
    run::Run,
    subset::Root,
};
use crate::{
    oci::{Child, Descriptor, Digest, RawManifest, Tag},
    registry::{Error, Side, Source, Target},
};

/// Deeper nesting is no image.
pub(super) const MAX_DEPTH: u32 = 8;
/// Children of one manifest that are copied side by side: more than a host is asked for at one time.
const CHILDREN_AT_ONCE: usize = 64;
/// More manifests under one root are no image.
const MAX_MANIFESTS: usize = 4096;

/// Copies everything under `root`, then what is attached to it, and then writes it under `tag`, if that has what is
/// expected.
///
/// Fails with the first error; what is at the target by then stays there and is found by the next run.
pub async fn copy(
    run: &Run,
    source: &Source,
    target: &Target,
    root: &Root,
    (tag, expected): (&Tag, &Expected),
    options: &CopyOptions,
) -> Result<(), CopyError> {
    let walk = Walk::new(run, source, target, root, options, false);
    let attached = async {
        // What is attached to the whole is not about a part of it.
        if root.is_whole() { walk.attached(&root.source_digest, 0).await } else { Ok(Attached::default()) }
    };
    let ((), attached) = try_join(walk.children(&root.manifest, 0, false), attached).await?;
    walk.found(&root.source_digest, attached, 0);
    walk.copy_found().await?;
    if let Expected::Still(expected) = expected
        && target.head(tag.as_str()).await.map_err(CopyError::target)? != *expected
    {
        return Err(CopyError::TargetChanged);
    }
    walk.put_tag_resending(tag, &root.manifest, 0).await?;
    walk.list_by_subject(&root.manifest).await
}

/// Copies what has been attached to an image since it was copied.
pub async fn copy_attached(
    run: &Run,
    source: &Source,
    target: &Target,
    root: &Root,
    options: &CopyOptions,
) -> Result<(), CopyError> {
    let walk = Walk::new(run, source, target, root, options, true);
    if root.is_whole() {
        walk.look_at(&root.source_digest, 0).await?;
    }
    walk.look_at_children(&root.manifest, 0).await?;
    walk.copy_found().await
}

pub(super) struct Walk<'a> {
    pub(super) run: &'a Run,
    pub(super) source: &'a Source,
    pub(super) target: &'a Target,
    pub(super) options: &'a CopyOptions,
    root: &'a Root,
    /// The image is at the target; what is attached may be too, and is looked for before it is copied.
    pub(super) looks: bool,
    seen: Mutex<HashSet<Digest>>,
    /// What has been asked for what is attached to it.
    pub(super) asked: Mutex<HashSet<Digest>>,
    /// What was found attached, to be copied when nobody waits for its subject any more: what is attached may name what
    /// it is attached to, so that waiting for each other would not end.
    found: Mutex<Vec<(Digest, Attached, u32)>>,
}

impl<'a> Walk<'a> {
    pub(super) fn new(
        run: &'a Run,
        source: &'a Source,
        target: &'a Target,
        root: &'a Root,
        options: &'a CopyOptions,
        looks: bool,
    ) -> Self {
        let (seen, asked, found) = Default::default();
        Self { run, source, target, options, root, looks, seen, asked, found }
    }

    /// Remembers what was found attached to `subject`.
    pub(super) fn found(&self, subject: &Digest, attached: Attached, depth: u32) {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.push((subject.clone(), attached, depth));
    }

    /// Copies what was found attached, and what is found attached to that.
    async fn copy_found(&self) -> Result<(), CopyError> {
        loop {
            let found = std::mem::take(&mut *self.found.lock().unwrap_or_else(PoisonError::into_inner));
            if found.is_empty() {
                return Ok(());
            }
            let copies = found.iter().map(|(subject, attached, depth)| self.copy_attached(subject, attached, *depth));
            try_join_all(copies).await?;
        }
    }

    /// Brings everything that `manifest` names to the target. `resend` sends also what the target said it has.
    pub(super) async fn children(&self, manifest: &RawManifest, depth: u32, resend: bool) -> Result<(), CopyError> {
        self.all(&self.named_by(manifest)?, depth, resend).await
    }

    async fn all(&self, children: &[Child], depth: u32, resend: bool) -> Result<(), CopyError> {
        let children = stream::iter(children.iter().map(Ok));
        children.try_for_each_concurrent(CHILDREN_AT_ONCE, |child| self.child(child, depth + 1, resend)).await
    }

    pub(super) fn named_by(&self, manifest: &RawManifest) -> Result<Vec<Child>, CopyError> {
        let subject = || format!("{}@{}", self.source.place(), manifest.digest);
        manifest.children().map_err(|error| CopyError::Manifest { subject: subject(), error })
    }

    pub(super) async fn child(&self, child: &Child, depth: u32, resend: bool) -> Result<(), CopyError> {
        let digest = &child.descriptor().digest;
        if resend {
            self.run.forget(self.target, digest);
        }
        let cell = self.run.cell(self.target, digest);
        let copy = || async {
            match child {
                Child::Blob(blob) if blob.is_foreign() && self.options.foreign_layers == ForeignLayers::Skip => Ok(()),
                Child::Blob(blob) => transfer(self.run, self.source, self.target, blob, resend).await,
                Child::Manifest(descriptor) => self.manifest(descriptor, depth, resend).await,
            }
        };
        cell.get_or_try_init(copy).await?;
        Ok(())
    }

    /// Boxed: manifests name manifests.
    fn manifest<'b>(
        &'b self,
        descriptor: &'b Descriptor,
        depth: u32,
        resend: bool,
    ) -> BoxFuture<'b, Result<(), CopyError>>
    where
        'a: 'b,
    {
        async move {
            self.check_bounds(&descriptor.digest, depth)?;
            let manifest = match self.fetch(descriptor).await {
                // An index may list other content than manifests. Distribution 2 answers 500 to who asks for a blob as one.
                Err(error) if !descriptor.is_manifest() && is_no_manifest(&error) => {
                    return transfer(self.run, self.source, self.target, descriptor, resend).await;
                }
                fetched => fetched.map_err(incomplete)?,
            };
            let digest = &descriptor.digest;
            let children = self.named_by(&manifest)?;
            let held = self.run.hold_manifest(manifest);
            let ((), attached) = try_join(self.all(&children, depth, resend), self.attached(digest, depth)).await?;
            let manifest = match held {
                Some(manifest) => manifest,
                None => self.fetch(descriptor).await.map_err(incomplete)?,
            };
            match self.target.put_manifest(&manifest).await {
                Err(error) if is_blob_unknown(&error) && !resend => {
                    self.all(&children, depth, true).await?;
                    self.target.put_manifest(&manifest).await.map_err(CopyError::target)?;
                }
                result => result.map_err(CopyError::target)?,
            }
            self.found(digest, attached, depth);
            Ok(())
        }
        .boxed()
    }

    /// The manifest that a descriptor names: rewritten for this copy, or from the source.
    pub(super) async fn fetch(&self, descriptor: &Descriptor) -> Result<RawManifest, Error> {
        if let Some(rewritten) = self.root.rewritten.iter().find(|manifest| manifest.digest == descriptor.digest) {
            return Ok(rewritten.clone());
        }
        let manifest = self.source.manifest(&descriptor.digest.to_string()).await?;
        Ok(RawManifest { media_type: type_to_send(&manifest, descriptor), ..manifest })
    }

    /// Looks for what is attached to a manifest that is at the target.
    async fn look_at(&self, digest: &Digest, depth: u32) -> Result<(), CopyError> {
        let attached = self.attached(digest, depth).await?;
        self.found(digest, attached, depth);
        Ok(())
    }

    /// Looks for what is attached to the manifests that one names, and to those that these name.
    fn look_at_children<'b>(&'b self, manifest: &'b RawManifest, depth: u32) -> BoxFuture<'b, Result<(), CopyError>>
    where
        'a: 'b,
    {
        async move {
            self.check_bounds(&manifest.digest, depth)?;
            let children = self.named_by(manifest)?;
            let manifests = children.iter().filter(|child| matches!(child, Child::Manifest(_))).map(Child::descriptor);
            try_join_all(manifests.map(|child| self.look_at_child(child, depth + 1))).await?;
            Ok(())
        }
        .boxed()
    }

    async fn look_at_child(&self, child: &Descriptor, depth: u32) -> Result<(), CopyError> {
        self.look_at(&child.digest, depth).await?;
        if !child.is_index() {
            return Ok(());
        }
        let nested = self.fetch(child).await.map_err(incomplete)?;
        self.look_at_children(&nested, depth).await
    }

    /// Moves a tag, if it may still be moved.
    pub(super) async fn put_tag(&self, tag: &Tag, manifest: &RawManifest) -> Result<(), CopyError> {
        if !self.run.fence().allows().await {
            return Err(CopyError::target(self.target.leadership_lost(tag)));
        }
        self.target.put_tag(tag, manifest).await.map_err(CopyError::target)
    }

    /// The same; what the target then denies having is sent again, once.
    pub(super) async fn put_tag_resending(
        &self,
        tag: &Tag,
        manifest: &RawManifest,
        depth: u32,
    ) -> Result<(), CopyError> {
        match self.put_tag(tag, manifest).await {
            Err(CopyError::Registry { error, .. }) if is_blob_unknown(&error) => {
                self.children(manifest, depth, true).await?;
                self.put_tag(tag, manifest).await
            }
            result => result,
        }
    }

    pub(super) fn check_bounds(&self, digest: &Digest, depth: u32) -> Result<(), CopyError> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.insert(digest.clone());
        let what = if depth > MAX_DEPTH {
            format!("its manifests are nested more than {MAX_DEPTH} deep")
        } else if seen.len() > MAX_MANIFESTS {
            format!("it names more than {MAX_MANIFESTS} manifests")
        } else {
            return Ok(());
        };
        Err(self.bounds(what))
    }

    pub(super) fn bounds(&self, what: String) -> CopyError {
        CopyError::Bounds { subject: format!("{}@{}", self.source.place(), self.root.source_digest), what }
    }
}

/// A child that the source does not have is a fault of the source's image, not of the name that was asked for.
pub(super) fn incomplete(error: Error) -> CopyError {
    CopyError::Registry { side: Side::Source, error: error.of_child() }
}

/// Some registries send manifests with a general type; the parent then knows better.
fn type_to_send(manifest: &RawManifest, descriptor: &Descriptor) -> String {
    let is_general =
        matches!(manifest.media_type.as_str(), "" | "application/json" | "application/octet-stream" | "text/plain");
    if is_general { descriptor.media_type.clone() } else { manifest.media_type.clone() }
}

/// Whether the source has no manifest of this digest, or has a blob that it takes for one.
fn is_no_manifest(error: &Error) -> bool {
    error.is_not_found() || error.status() == Some(http::StatusCode::INTERNAL_SERVER_ERROR)
}

fn is_blob_unknown(error: &Error) -> bool {
    matches!(error.code(), Some("MANIFEST_BLOB_UNKNOWN" | "BLOB_UNKNOWN"))
}
