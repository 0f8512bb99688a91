// Package testenv gives every test a database schema and queue names of its own
// on the servers that "make up" started. A missing server fails the test.
package testenv

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"os"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/txbox/txbox/migrations"
)

// DB is a migrated schema that nobody else uses.
type DB struct {
	*pgxpool.Pool
	URL    string
	Schema string
}

// Table returns the quoted, qualified name of a table in the schema.
func (db *DB) Table(name string) string { return pgx.Identifier{db.Schema, name}.Sanitize() }

// DatabaseURL returns DATABASE_URL.
func DatabaseURL(t testing.TB) string { return env(t, "DATABASE_URL") }

// AMQPURL returns AMQP_URL.
func AMQPURL(t testing.TB) string { return env(t, "AMQP_URL") }

func env(t testing.TB, name string) string {
	t.Helper()
	value := os.Getenv(name)
	if value == "" {
		t.Fatalf("%s is not set: run the tests with \"make test\", or \"make up\" and source .dev/env", name)
	}
	return value
}

// Name returns a name for a schema, queue or exchange that no other test uses.
func Name(t testing.TB) string {
	t.Helper()
	random := make([]byte, 6)
	if _, err := rand.Read(random); err != nil {
		t.Fatal(err)
	}
	return "t_" + hex.EncodeToString(random)
}

// Schema migrates a new schema and drops it when the test ends.
func Schema(t testing.TB) *DB {
	t.Helper()
	return SchemaAt(t, DatabaseURL(t))
}

// SchemaAt is Schema on a server of the test's own.
func SchemaAt(t testing.TB, databaseURL string) *DB {
	t.Helper()
	db := emptySchemaAt(t, databaseURL)
	if err := migrations.Up(Context(t), db.URL, migrations.Config{Schema: db.Schema}); err != nil {
		t.Fatalf("migrate: %v", err)
	}
	return db
}

// EmptySchema reserves the name of a schema, and drops it when the test ends.
func EmptySchema(t testing.TB) *DB {
	t.Helper()
	return emptySchemaAt(t, DatabaseURL(t))
}

func emptySchemaAt(t testing.TB, databaseURL string) *DB {
	t.Helper()
	db := &DB{URL: databaseURL, Schema: Name(t)}
	pool, err := pgxpool.New(Context(t), db.URL)
	if err != nil {
		t.Fatalf("connect: %v", err)
	}
	db.Pool = pool
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if _, err := pool.Exec(ctx, "DROP SCHEMA IF EXISTS "+pgx.Identifier{db.Schema}.Sanitize()+" CASCADE"); err != nil {
			t.Errorf("drop schema: %v", err)
		}
		pool.Close()
	})
	return db
}

// Context ends with the test, or after two minutes.
func Context(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// Eventually polls until done reports true, and fails the test if that takes
// longer than limit.
func Eventually(t testing.TB, limit time.Duration, what string, done func() bool) {
	t.Helper()
	deadline := time.NewTimer(limit)
	defer deadline.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("not within %s: %s", limit, what)
		}
	}
}
