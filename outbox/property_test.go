package outbox_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/jackc/pgx/v5"

	"github.com/txbox/txbox/internal/testenv"
	"github.com/txbox/txbox/outbox"
)

// anyString draws text around the limits, with all that makes trouble in it.
func anyString(limit int) *rapid.Generator[string] {
	return rapid.Custom(func(t *rapid.T) string {
		unit := rapid.SampledFrom([]string{"a", "ü", "€", "\n", "\r", "\x00", "\xff", "'", `"`, `\`, "\t", " "}).Draw(t, "unit")
		n := rapid.SampledFrom([]int{0, 1, 2, limit/2 - 1, limit / 2, limit/2 + 1, limit/3 + 1, limit - 1, limit, limit + 1}).Draw(t, "n")
		if len(unit) == 1 && !strings.ContainsAny(unit, "a' ") {
			n = min(n, 2)
		}
		return rapid.SampledFrom([]string{"", "", "b"}).Draw(t, "prefix") + strings.Repeat(unit, n)
	})
}

func anyHeaders() *rapid.Generator[map[string]string] {
	name := rapid.OneOf(
		rapid.SampledFrom([]string{
			"", "CC", "BCC", "cc", "Bcc", "CCC", "outbox-", "outbox-key", "outbox", "Outbox-key", "x-death", "x-deaths", "x-delay",
			"x-delivery-count", "x-acquired-count", "x-first-death-queue", "x-first-death", "x-last-death-reason", "x-opt-a", "x-stream-offset",
			"x-received-from", "x-shovelled", "x-datadog-trace-id", "traceparent", "x-", "a\nCC", "CC\n",
		}),
		anyString(255),
	)
	return rapid.Custom(func(t *rapid.T) map[string]string {
		headers := rapid.MapOfN(name, anyString(300), 0, 3).Draw(t, "named")
		for i := range rapid.SampledFrom([]int{0, 0, 0, 61, 62, 63, 64, 65}).Draw(t, "more") {
			headers[fmt.Sprintf("h%02d", i)] = "v"
		}
		if fill := rapid.SampledFrom([]int{0, 0, -1, 0, 1}).Draw(t, "fill"); len(headers) > 0 && fill != 0 {
			size := len("fill")
			for name, value := range headers {
				size += len(name) + len(value)
			}
			headers["fill"] = strings.Repeat("f", max(0, 32<<10-size+fill))
		}
		return headers
	})
}

// TestLibraryAndDatabaseAgreeOnEveryLimit writes each message twice: through the
// library, and with its fields as they are by a plain INSERT. Both accept it, or
// both refuse it.
func TestLibraryAndDatabaseAgreeOnEveryLimit(t *testing.T) {
	t.Parallel()
	ctx, db := testenv.Context(t), testenv.Schema(t)
	writer := outbox.Writer{Schema: db.Schema}
	insert := "INSERT INTO " + db.Table("outbox") + ` (message_id, key, exchange, routing_key, type, content_type, headers, payload)
		VALUES ($1, nullif($2, ''), $3, $4, $5, $6, $7, $8)`
	accepted := 0
	rapid.Check(t, func(t *rapid.T) {
		m := outbox.Message{ID: outbox.NewID(), Exchange: "x", ContentType: "text/plain", Payload: []byte{}}
		// One or two unusual fields at a time: a message of nothing else would hardly
		// ever be accepted.
		for range rapid.IntRange(0, 2).Draw(t, "fields") {
			switch rapid.IntRange(0, 5).Draw(t, "field") {
			case 0:
				m.Exchange = anyString(255).Draw(t, "exchange")
			case 1:
				m.RoutingKey = anyString(255).Draw(t, "routing key")
			case 2:
				m.Key = anyString(1024).Draw(t, "key")
			case 3:
				m.Type = anyString(255).Draw(t, "type")
			case 4:
				m.ContentType = "c" + anyString(254).Draw(t, "content type")
			case 5:
				m.Headers = anyHeaders().Draw(t, "headers")
			}
		}
		headers := m.Headers
		if headers == nil {
			headers = map[string]string{}
		}
		tx, err := db.Begin(ctx)
		if err != nil {
			t.Fatal(err)
		}
		defer tx.Rollback(ctx)
		byLibrary := writer.Write(ctx, tx, m)
		byDatabase := pgx.BeginFunc(ctx, tx, func(savepoint pgx.Tx) error {
			_, err := savepoint.Exec(ctx, insert, m.ID, m.Key, m.Exchange, m.RoutingKey, m.Type, m.ContentType, rawJSON(headers), m.Payload)
			return err
		})
		var invalid *outbox.InvalidError
		if byLibrary != nil && !errors.As(byLibrary, &invalid) {
			t.Fatalf("the library passed on what the database refused: %v", byLibrary)
		}
		if (byLibrary == nil) != (byDatabase == nil) {
			t.Fatalf("library: %v, database: %v", byLibrary, byDatabase)
		}
		if byLibrary == nil {
			accepted++
		}
	})
	if accepted == 0 {
		t.Error("no message was accepted, that shows nothing")
	}
}

// rawJSON encodes headers without mending invalid UTF-8, as another producer
// might.
func rawJSON(headers map[string]string) string {
	var parts []string
	quote := strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`, "\r", `\r`, "\t", `\t`, "\x00", `\u0000`)
	for name, value := range headers {
		parts = append(parts, `"`+quote.Replace(name)+`":"`+quote.Replace(value)+`"`)
	}
	return "{" + strings.Join(parts, ",") + "}"
}

func TestDatabaseRefusesWhatTheLibraryNeverWrites(t *testing.T) {
	t.Parallel()
	ctx, db := testenv.Context(t), testenv.Schema(t)
	for name, values := range map[string]string{
		"empty key":             `(message_id, exchange, key) VALUES (gen_random_uuid(), 'x', '')`,
		"no destination":        `(message_id) VALUES (gen_random_uuid())`,
		"no message id":         `(exchange) VALUES ('x')`,
		"headers not an object": `(message_id, exchange, headers) VALUES (gen_random_uuid(), 'x', '[]')`,
		"header not a string":   `(message_id, exchange, headers) VALUES (gen_random_uuid(), 'x', '{"a": 1}')`,
		"header null":           `(message_id, exchange, headers) VALUES (gen_random_uuid(), 'x', '{"a": null}')`,
		"nested header":         `(message_id, exchange, headers) VALUES (gen_random_uuid(), 'x', '{"a": {"b": "c"}}')`,
		"payload over 128 MiB":  `(message_id, exchange, payload) VALUES (gen_random_uuid(), 'x', convert_to(repeat('x', 134217729), 'UTF8'))`,
		"lane of one's own":     `(message_id, exchange, lane) VALUES (gen_random_uuid(), 'x', 1)`,
	} {
		if _, err := db.Exec(ctx, "INSERT INTO "+db.Table("outbox")+values); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
}
