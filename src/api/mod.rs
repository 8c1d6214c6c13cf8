//! The `ImageMirror` custom resource: types, schema, validation rules, condition types. No client, no I/O.
//!
//! The API server checks what the schema and its CEL rules say. Everything is checked again when an object is read
//! (`mirror`), because an object may have been stored under an older, looser schema.

mod condition;
mod duration;
pub mod schema;
pub mod v1alpha1;

pub use condition::{ConditionSet, ConditionType, Status};
pub use duration::parse_duration;
pub use v1alpha1::{ImageMirror, ImageMirrorSpec, ImageMirrorStatus};

pub use crate::reason::Reason;

/// Asks for a sync now: any value that is not the one in `status.lastHandledReconcileAt`.
pub const REQUESTED_AT: &str = "imagemirror.dev/requestedAt";
/// On a `kubernetes.io/basic-auth` Secret: the registry that it is for.
pub const REGISTRY_OF_SECRET: &str = "imagemirror.dev/registry";

/// The `CustomResourceDefinition` as it is installed.
///
/// Beside what the types say, a new object has the status `observedGeneration: -1`, so that waiting tools see it as in
/// progress until the operator has read it; and a null in the spec, as templates write it, is the same as nothing: the
/// API server leaves it out where it is not said to be a value.
pub fn crd() -> Result<serde_json::Value, serde_json::Error> {
    use kube::CustomResourceExt as _;
    let mut crd = serde_json::to_value(ImageMirror::crd())?;
    let status = crd.pointer_mut("/spec/versions/0/schema/openAPIV3Schema/properties/status");
    if let Some(serde_json::Value::Object(status)) = status {
        status.insert("default".into(), serde_json::json!({"observedGeneration": -1}));
    }
    if let Some(spec) = crd.pointer_mut("/spec/versions/0/schema/openAPIV3Schema/properties/spec") {
        forbid_null(spec);
    }
    Ok(crd)
}

fn forbid_null(schema: &mut serde_json::Value) {
    let Some(schema) = schema.as_object_mut() else { return };
    schema.remove("nullable");
    if let Some(fields) = schema.get_mut("properties").and_then(serde_json::Value::as_object_mut) {
        fields.values_mut().for_each(forbid_null);
    }
    schema.get_mut("items").into_iter().for_each(forbid_null);
}
