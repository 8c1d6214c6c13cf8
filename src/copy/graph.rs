//! The walk: a manifest's children first, then the manifest, at last the tag.

use std::{
    collections::HashSet,
    sync::{Mutex, PoisonError},
};

use futures::{
    FutureExt as _,
    future::{BoxFuture, try_join_all},
};

use super::{CopyError, blob::transfer, run::Run};
use crate::{
    oci::{Child, Descriptor, Digest, RawManifest, Tag},
    registry::{Error, Repository, Side},
};

/// Deeper nesting is no image.
const MAX_DEPTH: u32 = 8;
/// More manifests under one root are no image.
const MAX_MANIFESTS: usize = 4096;

/// Copies everything under `root` and then writes it under `tag`. Foreign layers, which their vendors distribute
/// elsewhere, are left out as the image specification allows.
///
/// Fails with the first error; what is at the target by then stays there and is found by the next run.
pub async fn copy(
    run: &Run,
    source: &Repository,
    target: &Repository,
    root: &RawManifest,
    tag: &Tag,
) -> Result<(), CopyError> {
    let walk = Walk { run, source, target, root: root.digest.clone(), seen: Mutex::default() };
    walk.children(root, 0, false).await?;
    let put = || async {
        if !run.fence().allows(target.client().timing().tag_write_margin).await {
            return Err(target.leadership_lost(tag));
        }
        target.put_tag(tag, root).await
    };
    match put().await {
        Err(error) if is_blob_unknown(&error) => {
            walk.children(root, 0, true).await?;
            put().await.map_err(CopyError::target)
        }
        result => result.map_err(CopyError::target),
    }
}

struct Walk<'a> {
    run: &'a Run,
    source: &'a Repository,
    target: &'a Repository,
    root: Digest,
    seen: Mutex<HashSet<Digest>>,
}

impl<'a> Walk<'a> {
    /// Brings everything that `manifest` names to the target. `resend` sends also what the target said it has.
    async fn children(&self, manifest: &RawManifest, depth: u32, resend: bool) -> Result<(), CopyError> {
        let subject = || format!("{}@{}", self.source.name(), manifest.digest);
        let children = manifest.children().map_err(|error| CopyError::Manifest { subject: subject(), error })?;
        try_join_all(children.iter().map(|child| self.child(child, depth + 1, resend))).await?;
        Ok(())
    }

    async fn child(&self, child: &Child, depth: u32, resend: bool) -> Result<(), CopyError> {
        let digest = &child.descriptor().digest;
        if resend {
            self.run.forget(self.target, digest);
        }
        let cell = self.run.cell(self.target, digest);
        let copy = || async {
            match child {
                Child::Blob(descriptor) if descriptor.is_foreign() => Ok(()),
                Child::Blob(descriptor) => transfer(self.run, self.source, self.target, descriptor, resend).await,
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
            let reference = descriptor.digest.to_string();
            let manifest = self.source.manifest(&reference).await.map_err(incomplete)?;
            let too_much = || self.bounds("its manifests are larger than any image's".to_owned());
            let _held = self.run.hold_manifest(manifest.bytes.len() as u64).ok_or_else(too_much)?;
            let manifest = RawManifest { media_type: type_to_send(&manifest, descriptor), ..manifest };
            self.children(&manifest, depth, resend).await?;
            match self.target.put_manifest(&reference, &manifest).await {
                Err(error) if is_blob_unknown(&error) && !resend => {
                    self.children(&manifest, depth, true).await?;
                    self.target.put_manifest(&reference, &manifest).await.map_err(CopyError::target)
                }
                result => result.map_err(CopyError::target),
            }
        }
        .boxed()
    }

    fn check_bounds(&self, digest: &Digest, depth: u32) -> Result<(), CopyError> {
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

    fn bounds(&self, what: String) -> CopyError {
        CopyError::Bounds { subject: format!("{}@{}", self.source.name(), self.root), what }
    }
}

/// A child that the source does not have is a fault of the source's image, not of the name that was asked for.
fn incomplete(error: Error) -> CopyError {
    CopyError::Registry { side: Side::Source, error: error.of_child() }
}

/// Some registries send manifests with a general type; the parent then knows better.
fn type_to_send(manifest: &RawManifest, descriptor: &Descriptor) -> String {
    let is_general =
        matches!(manifest.media_type.as_str(), "" | "application/json" | "application/octet-stream" | "text/plain");
    if is_general { descriptor.media_type.clone() } else { manifest.media_type.clone() }
}

fn is_blob_unknown(error: &Error) -> bool {
    matches!(error.code(), Some("MANIFEST_BLOB_UNKNOWN" | "BLOB_UNKNOWN"))
}
