//! Which images a run is about, where rules choose the tags: lists are read, tags chosen, and two images that want one
//! target tag are told apart.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use futures::{StreamExt as _, stream};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use super::{Failure, ImageRequest, ImageSource, Last, Registries, SyncRequest, Unknown, handles::open_source};
use crate::{
    copy::CopyError,
    oci::{Host, PlatformFilter, RepositoryName, Tag},
    reason::Reason,
    registry::{Client, MAX_PAGES},
    select::Selection,
};

/// Lists that are read side by side.
const LISTS_AT_ONCE: usize = 16;

/// A repository whose tags are chosen by rule.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SelectionRequest {
    /// The registry.
    pub host: Host,
    /// The repository.
    pub repository: RepositoryName,
    /// Which tags.
    pub select: Selection,
    /// The repository at the target.
    pub target_repository: RepositoryName,
    /// The platforms that are kept; none named is all.
    pub platforms: Vec<PlatformFilter>,
    /// How tags of the target's repository were after the last run, as far as that is known.
    pub last: BTreeMap<Tag, Last>,
    /// Why its images fail without a request, such as a missing Secret.
    pub blocked: Option<Failure>,
}

/// Reads the lists of tags and adds the images that are chosen to those of the request. `None` if `cancel` came first.
///
/// A list that cannot be read is an [`Unknown`] of the request. An image whose target tag another one of the request
/// wants too, with another content, is blocked. Of too many images none is left.
pub async fn choose(
    client: &Client,
    mut request: SyncRequest,
    selections: &[SelectionRequest],
    registries: &Registries,
    cancel: &CancellationToken,
) -> Option<SyncRequest> {
    if selections.is_empty() {
        return Some(request);
    }
    let deadline = Instant::now() + request.timeout;
    let lists = read_lists(client, selections, registries, deadline);
    let lists = cancel.run_until_cancelled(lists).await?;
    let mut taken: HashMap<(RepositoryName, Tag), ImageRequest> = HashMap::new();
    for image in &request.images {
        taken.insert((image.target_repository.clone(), image.target_tag.clone()), image.clone());
    }
    for selection in selections {
        let failure = match lists.get(&(selection.host.clone(), selection.repository.clone())) {
            _ if selection.blocked.is_some() => selection.blocked.clone(),
            Some(Ok(tags)) => {
                let chosen = selection.select.choose(tags).into_iter().map(|tag| selection.image(tag));
                request.images.extend(chosen.filter_map(|image| place(&mut taken, image)));
                None
            }
            Some(Err(failure)) => Some(failure.clone()),
            None => None,
        };
        request.unknown.extend(failure.map(|failure| selection.unknown(registries, failure)));
    }
    if let Some(message) = request.policy.too_many(request.images.len()) {
        let failure = Failure::new(Reason::InvalidSpec, &message);
        request.images.clear();
        request.unknown = selections.iter().map(|each| each.unknown(registries, failure.clone())).collect();
    }
    Some(request)
}

type Lists = HashMap<(Host, RepositoryName), Result<Vec<Tag>, Failure>>;

/// The tags of each repository that is chosen from, each list once.
async fn read_lists(
    client: &Client,
    selections: &[SelectionRequest],
    registries: &Registries,
    deadline: Instant,
) -> Lists {
    let open = selections.iter().filter(|selection| selection.blocked.is_none());
    let places: BTreeSet<_> = open.map(|selection| (selection.host.clone(), selection.repository.clone())).collect();
    let list = async |place: (Host, RepositoryName)| {
        let list = timeout_at(deadline, read_list(client, &place, registries)).await;
        let too_long = || Err(Failure::new(Reason::Timeout, "reading the list of tags took longer than spec.timeout"));
        (place, list.unwrap_or_else(|_| too_long()))
    };
    stream::iter(places.into_iter().map(list)).buffer_unordered(LISTS_AT_ONCE).collect().await
}

async fn read_list(
    client: &Client,
    (host, repository): &(Host, RepositoryName),
    registries: &Registries,
) -> Result<Vec<Tag>, Failure> {
    let fail = |error: CopyError| Failure::new(error.reason(), &error.message());
    let source = open_source(client, registries, host, repository)
        .ok_or_else(|| Failure::new(Reason::InternalError, "the source registry was not prepared for this run"))?
        .map_err(|error| fail(CopyError::source(error)))?;
    let list = source.tags(MAX_PAGES).await.map_err(|error| fail(CopyError::source(error)))?;
    if list.malformed > 0 {
        tracing::warn!(%host, source = %source.place(), tags = list.malformed, "tags that break the grammar were left out");
    }
    if !list.is_complete {
        let what = format!("the list of tags of {} has more than {MAX_PAGES} pages", source.place());
        return Err(Failure::new(Reason::SourceUnavailable, &what));
    }
    Ok(list.tags)
}

/// The image if nobody has its target tag; blocked if somebody has who wants another content there, and nothing if it
/// is the same.
fn place(taken: &mut HashMap<(RepositoryName, Tag), ImageRequest>, mut image: ImageRequest) -> Option<ImageRequest> {
    let key = (image.target_repository.clone(), image.target_tag.clone());
    let Some(other) = taken.get(&key) else {
        taken.insert(key, image.clone());
        return Some(image);
    };
    if (&other.source, &other.platforms) == (&image.source, &image.platforms) {
        return None;
    }
    let message = format!(
        "{}/{} wants the target tag {}:{} too, and is first in spec.images; give one of them another targetRepository",
        other.source.host, other.source.repository, key.0, key.1
    );
    image.blocked = Some(Failure::new(Reason::Conflict, &message));
    Some(image)
}

impl SelectionRequest {
    fn image(&self, tag: &Tag) -> ImageRequest {
        ImageRequest {
            source: ImageSource {
                host: self.host.clone(),
                repository: self.repository.clone(),
                tag: Some(tag.clone()),
                digest: None,
            },
            target_repository: self.target_repository.clone(),
            target_tag: tag.clone(),
            platforms: self.platforms.clone(),
            last: self.last.get(tag).cloned(),
            is_contested: false,
            blocked: None,
        }
    }

    /// `host/repository` at the target.
    #[must_use]
    pub fn target_of(&self, registries: &Registries) -> String {
        let source = (&self.host, &self.repository);
        let (host, repository) = registries.target.repository_of(source, &self.target_repository);
        format!("{host}/{repository}")
    }

    fn unknown(&self, registries: &Registries, failure: Failure) -> Unknown {
        let source = format!("{}/{}", self.host, self.repository);
        Unknown { source, target: self.target_of(registries), failure }
    }
}
