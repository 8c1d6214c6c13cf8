package main

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/fluxcd/cli-utils/pkg/kstatus/polling"
	"github.com/fluxcd/cli-utils/pkg/object"
	kustomize "github.com/fluxcd/kustomize-controller/api/v1"
	"github.com/fluxcd/pkg/ssa"
	source "github.com/fluxcd/source-controller/api/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"
	strict "sigs.k8s.io/yaml"
)

// wait is what the kustomize-controller does for a Kustomization with `wait: true`, after it has applied the object; but it
// looks more often than every 5 s.
func wait(arguments []string) error {
	flags := flag.NewFlagSet("wait", flag.ContinueOnError)
	kubeconfig := flags.String("kubeconfig", "", "")
	namespace := flags.String("namespace", "", "")
	name := flags.String("name", "", "")
	timeout := flags.Duration("timeout", time.Minute, "")
	if err := flags.Parse(arguments); err != nil {
		return err
	}
	config, err := clientcmd.BuildConfigFromFlags("", *kubeconfig)
	if err != nil {
		return err
	}
	c, err := client.New(config, client.Options{})
	if err != nil {
		return err
	}
	manager := ssa.NewResourceManager(c, polling.NewStatusPoller(c, c.RESTMapper(), polling.Options{}), ssa.Owner{})
	mirror := object.ObjMetadata{
		Namespace: *namespace, Name: *name,
		GroupKind: schema.GroupKind{Group: "imagemirror.dev", Kind: "ImageMirror"},
	}
	options := ssa.WaitOptions{Interval: 100 * time.Millisecond, Timeout: *timeout, FailFast: true}
	return manager.WaitForSet(object.ObjMetadataSet{mirror}, options)
}

// decode prints how many objects of Flux it has read, each without a field that Flux does not know.
func decode([]string) error {
	scheme := runtime.NewScheme()
	if err := errors.Join(kustomize.AddToScheme(scheme), source.AddToScheme(scheme)); err != nil {
		return err
	}
	documents, count := yaml.NewYAMLReader(bufio.NewReader(os.Stdin)), 0
	for {
		document, err := documents.Read()
		if errors.Is(err, io.EOF) {
			_, err = fmt.Println(count)
			return err
		} else if err != nil {
			return err
		}
		var kind runtime.TypeMeta
		if err := strict.Unmarshal(document, &kind); err != nil {
			return err
		}
		known, err := scheme.New(schema.FromAPIVersionAndKind(kind.APIVersion, kind.Kind))
		if err != nil {
			return err
		}
		if err := strict.UnmarshalStrict(document, known); err != nil {
			return fmt.Errorf("%s: %w", kind.Kind, err)
		}
		count++
	}
}
