package relay

import (
	"encoding/json"
	"maps"
	"testing"

	amqp "github.com/rabbitmq/amqp091-go"
	"pgregory.net/rapid"
)

func TestHeadersAreDecodedAsJSONIs(t *testing.T) {
	for _, text := range []string{
		`{}`, `{"a": "b"}`, `{"a": "b", "c": ""}`, `{"": ""}`, `{"a": 1, "b": "c"}`, `{"a": 1, "b": 2}`, `{"a":"b"}`, `{"a": "\""}`, `{"a": "b\\c"}`, `{"a": ": ", "b": ", "}`,
		`{"a": null}`, `{"a": {"b": "c"}}`, `{"a": ["b", "c"]}`, `{"a\u0000": "b"}`,
	} {
		checkHeaderText(t, text)
	}
	rapid.Check(t, func(t *rapid.T) {
		text, err := json.Marshal(rapid.MapOf(rapid.String(), rapid.String()).Draw(t, "headers"))
		if err != nil {
			t.Fatal(err)
		}
		checkHeaderText(t, string(text))
	})
}

func checkHeaderText(t interface{ Errorf(string, ...any) }, text string) {
	var got headerText
	var want map[string]any
	if err := got.ScanBytes([]byte(text)); err != nil {
		t.Errorf("%s: %v", text, err)
	}
	if err := json.Unmarshal([]byte(text), &want); err != nil {
		t.Errorf("%s: %v", text, err)
	}
	if !maps.EqualFunc(amqp.Table(got), want, func(a, b any) bool {
		x, errX := json.Marshal(a)
		y, errY := json.Marshal(b)
		return errX == nil && errY == nil && string(x) == string(y)
	}) {
		t.Errorf("%s: got %v", text, got)
	}
}
