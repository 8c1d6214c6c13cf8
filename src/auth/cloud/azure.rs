//! An identity of Entra at an Azure Container Registry: what an object must say of it, in every build.

use super::Principal;
use crate::{
    auth::{Credential, Unusable},
    oci::Host,
};

/// The application that a `ServiceAccount` is at Azure, and in which tenant (azure.github.io/azure-workload-identity).
pub(super) const CLIENT_ID: &str = "azure.workload.identity/client-id";
pub(super) const TENANT_ID: &str = "azure.workload.identity/tenant-id";

pub(super) fn login(host: &Host, principal: &Principal) -> Result<Credential, Unusable> {
    let application = match principal {
        Principal::Program => None,
        Principal::Account(account) => Some((account.annotation(CLIENT_ID)?, account.annotation(TENANT_ID)?)),
    };
    #[cfg(feature = "azure")]
    return Ok(super::entra::login(host, principal, application));
    #[cfg(not(feature = "azure"))]
    {
        let _ = (host, application);
        Err(super::not_built(super::Cloud::Azure))
    }
}
