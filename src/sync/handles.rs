//! The repositories of a run: images of one repository share what is learned about it.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use tokio::sync::OnceCell;

use super::{Destination, ImageRequest, Registries, Sources, SyncRequest};
use crate::{
    oci::{Digest, Host, RepositoryName, Tag},
    registry::{Client, Error, MAX_PAGES, Repository, Source, Target},
};

/// A list costs a request or more, so that this many tags are asked for one by one.
const WORTH_LISTING: usize = 8;

type Place = (Host, RepositoryName);

/// The repositories of a run.
pub(super) struct Handles<'a> {
    destination: &'a Destination,
    sources: HashMap<Place, Result<Source, Arc<Error>>>,
    targets: HashMap<Place, Result<TargetHandle, Arc<Error>>>,
}

/// A repository at the target, and which of the wanted tags it has.
pub(super) struct TargetHandle {
    pub(super) repository: Target,
    wanted: usize,
    listed: OnceCell<Option<HashSet<Tag>>>,
}

impl<'a> Handles<'a> {
    pub(super) fn of(client: &Client, request: &SyncRequest, registries: &'a Registries) -> Self {
        let destination = &registries.target;
        let mut this = Self { destination, sources: HashMap::new(), targets: HashMap::new() };
        for image in &request.images {
            let (host, name) = (image.source.host.clone(), image.source.repository.clone());
            if let Some(source) = open_source(client, registries, &host, &name) {
                this.sources.entry((host, name)).or_insert(source.map_err(Arc::new));
            }
            let (host, name, _) = destination.place_of(image);
            let target = this.targets.entry((host.clone(), name.clone())).or_insert_with(|| {
                let repository = match destination {
                    Destination::Registry(access) => {
                        Target::Registry(Repository::for_push(client, access, name).map_err(Arc::new)?)
                    }
                    Destination::Layout(layout) => Target::Layout(layout.repository(host, name)),
                };
                Ok(TargetHandle { repository, wanted: 0, listed: OnceCell::new() })
            });
            if let Ok(target) = target {
                target.wanted += 1;
            }
        }
        this
    }

    pub(super) fn destination(&self) -> &Destination {
        self.destination
    }

    /// `None` if there is nothing that says how the source is reached.
    pub(super) fn source(&self, image: &ImageRequest) -> Option<&Result<Source, Arc<Error>>> {
        self.sources.get(&(image.source.host.clone(), image.source.repository.clone()))
    }

    pub(super) fn target(&self, image: &ImageRequest) -> Option<&Result<TargetHandle, Arc<Error>>> {
        let (host, name, _) = self.destination.place_of(image);
        self.targets.get(&(host, name))
    }
}

/// A repository that images come from. `None` if there is nothing that says how it is reached.
pub(super) fn open_source(
    client: &Client,
    registries: &Registries,
    host: &Host,
    name: &RepositoryName,
) -> Option<Result<Source, Error>> {
    match &registries.sources {
        Sources::Layout(layout) => Some(Ok(Source::Layout(layout.repository(host.clone(), name.clone())))),
        Sources::Registries(accesses) => {
            accesses.get(host).map(|access| Repository::for_pull(client, access, name.clone()).map(Source::Registry))
        }
    }
}

impl Destination {
    /// Where the images of a source repository go: its host and name, or those that it has at the source.
    pub(super) fn repository_of(
        &self,
        (host, name): (&Host, &RepositoryName),
        target: &RepositoryName,
    ) -> (Host, RepositoryName) {
        match self {
            Self::Registry(access) => (access.host.clone(), target.clone()),
            Self::Layout(_) => (host.clone(), name.clone()),
        }
    }

    /// The target of an image with its tag, as reports name it.
    #[must_use]
    pub fn target_of(&self, image: &ImageRequest) -> String {
        let (host, repository, tag) = self.place_of(image);
        format!("{host}/{repository}:{tag}")
    }

    /// Where an image goes. In a directory it keeps the name that it has at its source.
    pub(super) fn place_of(&self, image: &ImageRequest) -> (Host, RepositoryName, Tag) {
        match self {
            Self::Registry(access) => (access.host.clone(), image.target_repository.clone(), image.target_tag.clone()),
            Self::Layout(_) => {
                let tag = image.source.tag.as_ref().unwrap_or(&image.target_tag);
                (image.source.host.clone(), image.source.repository.clone(), tag.clone())
            }
        }
    }
}

impl TargetHandle {
    /// The digest that a tag has. Where many tags are wanted and the first one is not there, the rest is looked up in
    /// one list.
    pub(super) async fn digest_of(&self, tag: &Tag) -> Result<Option<Digest>, Error> {
        if self.wanted <= WORTH_LISTING {
            return self.repository.head(tag.as_str()).await;
        }
        let mut mine = None;
        let look = async || {
            let found = self.repository.head(tag.as_str()).await?;
            mine = Some(found.clone());
            Ok(if found.is_some() { None } else { self.list().await })
        };
        let listed = self.listed.get_or_try_init(look).await?;
        match (mine, listed) {
            (Some(found), _) => Ok(found),
            (None, Some(tags)) if !tags.contains(tag) => Ok(None),
            (None, _) => self.repository.head(tag.as_str()).await,
        }
    }

    /// Whether the tags that are wanted are likely to be there: the first one of many was.
    pub(super) fn is_likely_complete(&self) -> bool {
        matches!(self.listed.get(), Some(None))
    }

    /// The tags, if they can be listed. A repository that does not exist has none.
    async fn list(&self) -> Option<HashSet<Tag>> {
        match self.repository.tags(MAX_PAGES).await {
            Ok(list) => list.is_complete.then(|| list.tags.into_iter().collect()),
            Err(error) if error.is_not_found() => Some(HashSet::new()),
            Err(error) => {
                tracing::debug!(host = %error.host, %error, "the tags of the target cannot be listed: each is asked for");
                None
            }
        }
    }
}
