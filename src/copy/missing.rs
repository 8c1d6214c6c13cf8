//! What a copy would move: read from the source's manifests and asked of the target, without writing anything.

use std::collections::BTreeMap;

use futures::{
    FutureExt as _, StreamExt as _, TryStreamExt as _,
    future::{BoxFuture, try_join_all},
    stream,
};

use super::{
    CopyError, CopyOptions, ForeignLayers, Root, Run,
    graph::{Walk, incomplete},
};
use crate::{
    oci::{Child, Descriptor, Digest, RawManifest},
    registry::{Source, Target},
};

/// Blobs that are asked for side by side.
const AT_ONCE: usize = 16;

/// The blobs of an image that the target does not have, each once. What is attached to the image is not looked at.
pub async fn missing(
    run: &Run,
    source: &Source,
    target: &Target,
    root: &Root,
    options: &CopyOptions,
) -> Result<Vec<Descriptor>, CopyError> {
    let walk = Walk::new(run, source, target, root, options, true);
    let blobs = walk.blobs(&root.manifest, 0).await?;
    let absent = async |blob: Descriptor| {
        let is_there = target.has_blob(&blob.digest).await.map_err(CopyError::target)?;
        let blob = source.with_size(&blob).await.map_err(CopyError::source)?;
        Ok((!is_there).then_some(blob))
    };
    let found = stream::iter(blobs.into_values().map(absent)).buffer_unordered(AT_ONCE);
    found.try_filter_map(|found| async { Ok(found) }).try_collect().await
}

impl<'a> Walk<'a> {
    /// The blobs that a manifest names, and the manifests that it names.
    fn blobs<'b>(
        &'b self,
        manifest: &'b RawManifest,
        depth: u32,
    ) -> BoxFuture<'b, Result<BTreeMap<Digest, Descriptor>, CopyError>>
    where
        'a: 'b,
    {
        async move {
            self.check_bounds(&manifest.digest, depth)?;
            let children = self.named_by(manifest)?;
            let of_child = async |child| match child {
                Child::Blob(blob) if blob.is_foreign() && self.options.foreign_layers == ForeignLayers::Skip => {
                    Ok(BTreeMap::new())
                }
                Child::Blob(blob) => Ok(BTreeMap::from([(blob.digest.clone(), blob)])),
                Child::Manifest(child) => match self.fetch(&child).await {
                    Err(error) if !child.is_manifest() && error.is_not_found() => {
                        Ok(BTreeMap::from([(child.digest.clone(), child)]))
                    }
                    fetched => self.blobs(&fetched.map_err(incomplete)?, depth + 1).await,
                },
            };
            let found = try_join_all(children.into_iter().map(of_child)).await?;
            Ok(found.into_iter().flatten().collect())
        }
        .boxed()
    }
}
