//! One blob from source to target, and the count of what it came to.

use std::sync::Arc;

use super::{CopyError, run::Run};
use crate::{
    oci::Descriptor,
    registry::{BlobOpener, PutError, PutOptions, Source, Target},
};

/// Brings a blob to the target. `resend` is for a target that denied having what it said was present.
pub(super) async fn transfer(
    run: &Run,
    source: &Source,
    target: &Target,
    descriptor: &Descriptor,
    resend: bool,
) -> Result<(), CopyError> {
    let descriptor = source.with_size(descriptor).await.map_err(CopyError::source)?;
    let size = descriptor.size;
    let meter = Arc::new(run.meter(size));
    let options = PutOptions { sessions: run.sessions(), meter, resend };
    let put = target.put_blob(&BlobOpener::new(source, descriptor), &options).await;
    let stored = put.map_err(|error| match error {
        PutError::Source(error) => CopyError::source(error),
        PutError::Target(error) => CopyError::target(error),
    })?;
    run.count(stored, size);
    target.count(source, stored, size);
    Ok(())
}
