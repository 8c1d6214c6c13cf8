//! What is attached to an image: found by the referrers API, by the fallback tag of its digest, and under the tags that
//! cosign gives it; copied with it; and made findable at a target that has no referrers API
//! (distribution-spec, "Listing referrers" and "Referrers tag schema").

use std::{
    collections::HashSet,
    sync::{Arc, PoisonError},
};

use futures::future::try_join_all;

use super::{
    CopyError,
    graph::Walk,
    options::{CopyOptions, Referrers},
    run::{Run, SourceTags},
};
use crate::{
    oci::{Child, Digest, ManifestError, RawDescriptor, RawIndex, RawManifest, Tag, media_type},
    registry::Source,
};

/// What is attached to what is attached, no deeper than this.
pub(super) const MAX_ATTACHED_DEPTH: u32 = 4;
/// More are attached to no image.
const MAX_ATTACHED: usize = 1000;
/// Tags of a source are read this far to find those that are about digests.
const TAG_PAGES: usize = 5;
/// Rounds of an update that others may undo.
const MAX_ROUNDS: u32 = 5;

/// What cosign appends to the tag that is made of a digest, and the artifact types that select it.
const COSIGN: [(&str, &str); 3] = [
    (".sig", "application/vnd.dev.cosign.artifact.sig.v1+json"),
    (".att", "application/vnd.dev.cosign.artifact.att.v1+json"),
    (".sbom", "application/vnd.dev.cosign.artifact.sbom.v1+json"),
];

/// What was found attached to one manifest.
#[derive(Default)]
pub(super) struct Attached {
    referrers: Vec<RawDescriptor>,
    tags: Vec<Tag>,
}

/// `sha256-<hex>`: the tag under which a digest's referrers are listed, and the beginning of cosign's tags.
pub(super) fn tag_text(digest: &Digest) -> String {
    // The specification cuts what is longer than a tag may be.
    format!("{}-{}", digest.algorithm(), digest.hex()).chars().take(128).collect()
}

/// Whether the source can have anything attached to an image, or to what that names: not where it has no referrers API
/// and no tag that is made of a digest.
pub async fn may_have_attached(
    run: &Run,
    source: &Source,
    image: &Digest,
    options: &CopyOptions,
) -> Result<bool, CopyError> {
    if options.referrers == Referrers::None {
        return Ok(false);
    }
    let has_api = source.has_referrers_api(image).await.map_err(CopyError::source)?;
    Ok(has_api || !source_tags(run, source).await.are_none())
}

impl Walk<'_> {
    /// What the source has attached to a manifest, as far as it is wanted. Nothing the second time.
    pub(super) async fn attached(&self, subject: &Digest, depth: u32) -> Result<Attached, CopyError> {
        let wanted = &self.options.referrers;
        if *wanted == Referrers::None || depth > MAX_ATTACHED_DEPTH {
            return Ok(Attached::default());
        }
        if !self.asked.lock().unwrap_or_else(PoisonError::into_inner).insert(subject.clone()) {
            return Ok(Attached::default());
        }
        let by_api = self.source.referrers(subject).await.map_err(CopyError::source)?;
        let tags = source_tags(self.run, self.source).await;
        let mut found = match by_api {
            Some(found) => found,
            None => self.by_fallback_tag(subject, &tags).await?,
        };
        let mut seen = HashSet::new();
        found.retain(|entry| {
            let is_wanted = wanted.selects(entry.artifact_type.as_deref());
            is_wanted && entry.descriptor.digest != *subject && seen.insert(entry.descriptor.digest.clone())
        });
        if found.len() > MAX_ATTACHED {
            return Err(self.bounds(format!("more than {MAX_ATTACHED} artifacts are attached to {subject}")));
        }
        Ok(Attached { referrers: found, tags: self.cosign_tags(subject, &tags).await? })
    }

    async fn by_fallback_tag(&self, subject: &Digest, tags: &SourceTags) -> Result<Vec<RawDescriptor>, CopyError> {
        let tag = tag_text(subject);
        if !tags.may_have(&tag) {
            return Ok(Vec::new());
        }
        match self.source.manifest(&tag).await {
            // Some registries read the tag as the digest that it is made of.
            Ok(manifest) if manifest.digest == *subject => Ok(Vec::new()),
            Ok(manifest) if manifest.is_index() => {
                let index = RawIndex::parse(&manifest.bytes);
                Ok(index.map_err(|error| self.refused(&manifest.digest, error))?.manifests)
            }
            // Somebody's image that is called so.
            Ok(_) => Ok(Vec::new()),
            Err(error) if error.is_not_found() => Ok(Vec::new()),
            Err(error) => Err(CopyError::source(error)),
        }
    }

    async fn cosign_tags(&self, subject: &Digest, tags: &SourceTags) -> Result<Vec<Tag>, CopyError> {
        let mut found = Vec::new();
        for (suffix, artifact_type) in COSIGN {
            if !self.options.referrers.selects(Some(artifact_type)) {
                continue;
            }
            let text = format!("{}{suffix}", tag_text(subject));
            let Ok(tag) = text.parse::<Tag>() else { continue };
            let exists = match tags {
                SourceTags::All(tags) => tags.contains(&tag),
                SourceTags::Unknown => self.source.head(&text).await.map_err(CopyError::source)?.is_some(),
            };
            if exists {
                found.push(tag);
            }
        }
        Ok(found)
    }

    /// Copies what was found attached to `subject`, and makes it findable.
    pub(super) async fn copy_attached(
        &self,
        subject: &Digest,
        attached: &Attached,
        depth: u32,
    ) -> Result<(), CopyError> {
        let referrers = try_join_all(attached.referrers.iter().map(|entry| self.referrer(entry, depth))).await?;
        let to_list: Vec<&RawDescriptor> = attached
            .referrers
            .iter()
            .zip(referrers)
            .filter(|(_, is_listed)| !is_listed)
            .map(|(entry, _)| entry)
            .collect();
        if !to_list.is_empty() {
            self.list(subject, &to_list).await?;
        }
        try_join_all(attached.tags.iter().map(|tag| self.cosign(tag, depth))).await?;
        Ok(())
    }

    /// Copies one referrer. True if the target lists it by itself.
    async fn referrer(&self, entry: &RawDescriptor, depth: u32) -> Result<bool, CopyError> {
        let digest = &entry.descriptor.digest;
        let is_there = self.looks && self.target.head(&digest.to_string()).await.map_err(CopyError::target)?.is_some();
        if is_there {
            let attached = self.attached(digest, depth + 1).await?;
            self.found(digest, attached, depth + 1);
        } else {
            self.child(&Child::Manifest(entry.descriptor.clone()), depth + 1, false).await?;
        }
        self.target.lists_by_subject(digest).await.map_err(CopyError::target)
    }

    /// Lists an artifact that is copied for itself under its subject, where the target does not do so.
    pub(super) async fn list_by_subject(&self, manifest: &RawManifest) -> Result<(), CopyError> {
        if !manifest.has_subject() {
            return Ok(());
        }
        let found = RawDescriptor::of_attached(manifest).map_err(|error| self.refused(&manifest.digest, error))?;
        let Some((subject, entry)) = found else { return Ok(()) };
        if self.target.lists_by_subject(&subject).await.map_err(CopyError::target)? {
            return Ok(());
        }
        self.list(&subject, &[&entry]).await
    }

    /// Lists entries under the fallback tag of `subject` at the target, beside those that are there.
    ///
    /// No registry can compare and set: what another client writes just before the writing is lost to it. So it is looked
    /// at right before, and read again until everything is there.
    async fn list(&self, subject: &Digest, entries: &[&RawDescriptor]) -> Result<(), CopyError> {
        let text = tag_text(subject);
        let Ok(tag) = text.parse::<Tag>() else { return Ok(()) };
        let lock = self.run.fallback_lock(self.target, &text);
        let _alone = lock.lock().await;
        let mut was_there = false;
        for _ in 0..MAX_ROUNDS {
            let (mut index, media_type, read) = match self.target.manifest(&text).await {
                Ok(manifest) if manifest.digest == *subject => return Err(self.unlisted(subject)),
                Ok(manifest) => {
                    let index = RawIndex::parse(&manifest.bytes);
                    let index = index.map_err(|error| self.refused(&manifest.digest, error))?;
                    (index, manifest.media_type, Some(manifest.digest))
                }
                Err(error) if error.is_not_found() => (RawIndex::empty(), media_type::OCI_INDEX.to_owned(), None),
                Err(error) => return Err(CopyError::target(error)),
            };
            let listed: HashSet<Digest> = index.manifests.iter().map(|entry| entry.descriptor.digest.clone()).collect();
            let missing: Vec<_> = entries.iter().filter(|entry| !listed.contains(&entry.descriptor.digest)).collect();
            if missing.is_empty() {
                return Ok(());
            }
            was_there |= read.is_some();
            index.manifests.extend(missing.into_iter().map(|entry| (*entry).clone()));
            let manifest = index.to_manifest(&media_type, &Digest::sha256(b""));
            let manifest = manifest.map_err(|error| self.refused(subject, error))?;
            // Reading may have taken long: what has come since is not overwritten.
            if self.target.head(&text).await.map_err(CopyError::target)? == read {
                self.put_tag(&tag, &manifest).await?;
            }
        }
        // Taken, and never seen: it went elsewhere.
        if !was_there {
            return Err(self.unlisted(subject));
        }
        let what = format!("what is attached to {subject} does not stay listed at {}", self.target.place());
        Err(CopyError::Contended(format!("{what}: another client writes the tag {tag} too")))
    }

    fn unlisted(&self, subject: &Digest) -> CopyError {
        CopyError::Unlisted { subject: subject.clone(), target: self.target.place() }
    }

    /// Copies what cosign put under a tag that is made of a digest.
    async fn cosign(&self, tag: &Tag, depth: u32) -> Result<(), CopyError> {
        let manifest = self.source.manifest(tag.as_str()).await.map_err(CopyError::source)?;
        if self.looks {
            let present = self.target.head(tag.as_str()).await.map_err(CopyError::target)?;
            if present.as_ref() == Some(&manifest.digest) {
                return Ok(());
            }
        }
        self.children(&manifest, depth, false).await?;
        self.put_tag_resending(tag, &manifest, depth).await
    }

    fn refused(&self, digest: &Digest, error: serde_json::Error) -> CopyError {
        let subject = format!("{}@{digest}", self.source.place());
        CopyError::Manifest { subject, error: ManifestError::Json(error) }
    }
}

/// The tags of the source that are about digests: one list for all images of the repository.
async fn source_tags(run: &Run, source: &Source) -> Arc<SourceTags> {
    let cell = run.source_tags(source);
    let list = async || {
        let listed = source.tags(TAG_PAGES).await;
        Arc::new(match listed {
            Ok(list) if list.is_complete => {
                let about_digests =
                    |tag: &Tag| tag.as_str().starts_with("sha256-") || tag.as_str().starts_with("sha512-");
                SourceTags::All(list.tags.into_iter().filter(about_digests).collect())
            }
            // Not every registry lets everybody list. Then each digest is asked for.
            other => {
                if let Err(error) = other {
                    tracing::debug!(host = %error.host, %error, "the tags of the source cannot be listed");
                }
                SourceTags::Unknown
            }
        })
    };
    Arc::clone(cell.get_or_init(list).await)
}
