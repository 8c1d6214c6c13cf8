package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	lua "github.com/yuin/gopher-lua"
	luajson "layeh.com/gopher-json"
)

type said struct {
	Health  any            `json:"health"`
	Actions any            `json:"actions"`
	After   map[string]any `json:"after"`
}

func runLua(arguments []string) error {
	if len(arguments) != 1 {
		return errors.New("gitops lua FOLDER")
	}
	folder := arguments[0]
	actions, err := filepath.Glob(filepath.Join(folder, "actions/*/action.lua"))
	if err != nil {
		return err
	}
	// All of it first: whoever writes may read only then.
	text, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	objects := json.NewDecoder(bytes.NewReader(text))
	for {
		var object map[string]any
		if err := objects.Decode(&object); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		of := said{After: map[string]any{}}
		if of.Health, err = evaluate(filepath.Join(folder, "health.lua"), object); err != nil {
			return err
		}
		if of.Actions, err = evaluate(filepath.Join(folder, "actions/discovery.lua"), object); err != nil {
			return err
		}
		for _, action := range actions {
			name := filepath.Base(filepath.Dir(action))
			if of.After[name], err = evaluate(action, object); err != nil {
				return err
			}
		}
		if err := json.NewEncoder(os.Stdout).Encode(of); err != nil {
			return err
		}
	}
}

// evaluate runs a script as Argo CD does where users have not asked for more: with the base library, tables, and of os what
// tells the time; for a second at most; the object is the global obj, and what is returned is a table.
func evaluate(script string, object map[string]any) (any, error) {
	l := lua.NewState(lua.Options{SkipOpenLibs: true})
	defer l.Close()
	for name, open := range map[string]lua.LGFunction{
		lua.LoadLibName: lua.OpenPackage, lua.BaseLibName: lua.OpenBase, lua.TabLibName: lua.OpenTable, lua.OsLibName: openTime,
	} {
		if err := l.CallByParam(lua.P{Fn: l.NewFunction(open), Protect: true}, lua.LString(name)); err != nil {
			return nil, err
		}
	}
	l.PreloadModule(lua.OsLibName, openTime)
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	l.SetContext(ctx)
	l.SetGlobal("obj", luajson.DecodeValue(l, object))
	if err := l.DoFile(script); err != nil {
		return nil, fmt.Errorf("%s: %w", script, err)
	}
	returned := l.Get(-1)
	if returned.Type() != lua.LTTable {
		return nil, fmt.Errorf("%s returns %s, and not a table", script, returned.Type())
	}
	text, err := luajson.Encode(returned)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", script, err)
	}
	var value any
	return value, json.Unmarshal(text, &value)
}

// openTime gives what Argo CD leaves of os.
func openTime(l *lua.LState) int {
	lua.OpenOs(l)
	whole := l.CheckTable(-1)
	l.Pop(1)
	time := l.NewTable()
	for _, name := range []string{"date", "time"} {
		l.SetField(time, name, l.GetField(whole, name))
	}
	l.SetGlobal(lua.OsLibName, time)
	l.Push(time)
	return 1
}
