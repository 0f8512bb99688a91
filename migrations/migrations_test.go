package migrations_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"

	"github.com/txbox/txbox/internal/dbschema"
	"github.com/txbox/txbox/internal/testenv"
	"github.com/txbox/txbox/migrations"
)

var update = flag.Bool("update", false, "rewrite testdata")

func TestUpIsIdempotentAndDownRemovesEverything(t *testing.T) {
	t.Parallel()
	ctx, db := testenv.Context(t), testenv.EmptySchema(t)
	cfg := migrations.Config{Schema: db.Schema}
	wantState(t, db, migrations.State{Latest: dbschema.Version})
	for range 2 {
		if err := migrations.Up(ctx, db.URL, cfg); err != nil {
			t.Fatal(err)
		}
		wantState(t, db, migrations.State{Version: dbschema.Version, Latest: dbschema.Version})
	}
	for range 2 {
		if err := migrations.Down(ctx, db.URL, cfg); err != nil {
			t.Fatal(err)
		}
	}
	wantState(t, db, migrations.State{Latest: dbschema.Version})
	var left []string
	err := db.QueryRow(ctx, `SELECT coalesce(array_agg(relname::text), '{}') FROM pg_class
		WHERE relnamespace = $1::text::regnamespace AND relname NOT LIKE 'txbox_migrations%'`, db.Schema).Scan(&left)
	if err != nil || len(left) > 0 {
		t.Fatalf("Down left %v, %v", left, err)
	}
	if err := migrations.Up(ctx, db.URL, cfg); err != nil {
		t.Fatalf("Up after Down: %v", err)
	}
}

func TestFiveProcessesMayRaceToMigrate(t *testing.T) {
	t.Parallel()
	ctx, db := testenv.Context(t), testenv.EmptySchema(t)
	var group errgroup.Group
	for range 5 {
		group.Go(func() error { return migrations.Up(ctx, db.URL, migrations.Config{Schema: db.Schema}) })
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	wantState(t, db, migrations.State{Version: dbschema.Version, Latest: dbschema.Version})
}

func TestDownRefusesToLoseMessages(t *testing.T) {
	t.Parallel()
	ctx, db := testenv.Context(t), testenv.Schema(t)
	inserts := map[string]string{
		"outbox":        `(message_id, exchange) VALUES (gen_random_uuid(), 'x')`,
		"outbox_parked": `(reason, message_id, exchange) VALUES ('dead', gen_random_uuid(), 'x')`,
		"inbox_parked":  `(reason, consumer, message_id) VALUES ('dead', 'c', 'm')`,
	}
	for table, values := range inserts {
		if _, err := db.Exec(ctx, "INSERT INTO "+db.Table(table)+values); err != nil {
			t.Fatal(err)
		}
		err := migrations.Down(ctx, db.URL, migrations.Config{Schema: db.Schema})
		if !errors.Is(err, migrations.ErrNotEmpty) || !strings.Contains(err.Error(), table) {
			t.Errorf("with a row in %s: %v", table, err)
		}
		if _, err := db.Exec(ctx, "DELETE FROM "+db.Table(table)); err != nil {
			t.Fatal(err)
		}
	}
	if err := migrations.Down(ctx, db.URL, migrations.Config{Schema: db.Schema}); err != nil {
		t.Errorf("when all is empty: %v", err)
	}
}

func TestDirtyVersionIsNamedAndForceMendsIt(t *testing.T) {
	t.Parallel()
	ctx, db := testenv.Context(t), testenv.Schema(t)
	cfg := migrations.Config{Schema: db.Schema}
	if _, err := db.Exec(ctx, "UPDATE "+db.Table("txbox_migrations")+" SET dirty = true"); err != nil {
		t.Fatal(err)
	}
	wantState(t, db, migrations.State{Version: dbschema.Version, Latest: dbschema.Version, Dirty: true})
	for name, do := range map[string]func(context.Context, string, migrations.Config) error{"Up": migrations.Up, "Down": migrations.Down} {
		err := do(ctx, db.URL, cfg)
		if !errors.Is(err, migrations.ErrDirty) || !strings.Contains(err.Error(), db.Schema) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := migrations.Force(ctx, db.URL, cfg, dbschema.Version); err != nil {
		t.Fatal(err)
	}
	if err := migrations.Up(ctx, db.URL, cfg); err != nil {
		t.Errorf("Up after Force: %v", err)
	}
	if err := migrations.Force(ctx, db.URL, cfg, dbschema.Version+1); err == nil {
		t.Error("Force accepted a version that does not exist")
	}
}

func TestNewerSchemaIsLeftAloneWhileItServesThisProgram(t *testing.T) {
	t.Parallel()
	ctx, db := testenv.Context(t), testenv.Schema(t)
	cfg := migrations.Config{Schema: db.Schema}
	newer := dbschema.Version + 1
	if _, err := db.Exec(ctx, fmt.Sprintf("UPDATE %s SET version = %d", db.Table("txbox_migrations"), newer)); err != nil {
		t.Fatal(err)
	}
	for since, want := range map[int]error{dbschema.Version: nil, newer: migrations.ErrIncompatible} {
		if _, err := db.Exec(ctx, "UPDATE "+db.Table("txbox_version")+" SET version = $1, compatible_since = $2", newer, since); err != nil {
			t.Fatal(err)
		}
		if err := migrations.Up(ctx, db.URL, cfg); !errors.Is(err, want) {
			t.Errorf("compatible since %d: got %v, want %v", since, err, want)
		}
	}
	if err := migrations.Down(ctx, db.URL, cfg); err == nil {
		t.Error("Down of a newer schema was not refused")
	}
}

func TestEveryMigrationUpdatesTheVersionRow(t *testing.T) {
	t.Parallel()
	ctx, db := testenv.Context(t), testenv.Schema(t)
	files, err := fs.Glob(migrations.FS, "*.up.sql")
	if err != nil || len(files) != dbschema.Version {
		t.Fatalf("%d files, program wants version %d, %v", len(files), dbschema.Version, err)
	}
	if err := dbschema.CheckVersion(ctx, db, db.Schema); err != nil {
		t.Fatal(err)
	}
}

func TestCancelEndsTheWaitForTheMigrationLock(t *testing.T) {
	t.Parallel()
	db := testenv.Schema(t)
	blocker, err := db.Begin(testenv.Context(t))
	if err != nil {
		t.Fatal(err)
	}
	defer blocker.Rollback(testenv.Context(t))
	if _, err := blocker.Exec(testenv.Context(t), "LOCK TABLE "+db.Table("txbox_migrations")); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(testenv.Context(t), 100*time.Millisecond)
	defer cancel()
	if err := migrations.Up(ctx, db.URL, migrations.Config{Schema: db.Schema}); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %v", err)
	}
}

func TestSchemaNamesThatAreRefused(t *testing.T) {
	t.Parallel()
	for _, name := range []string{
		"outbox; drop table x", `Ou"tbox`, "a.b", strings.Repeat("a", 64), "pg_catalog", "PG_temp",
		"information_schema", "1st", "with space", "nul\x00", "ümlaut",
	} {
		err := migrations.Up(testenv.Context(t), testenv.DatabaseURL(t), migrations.Config{Schema: name})
		if err == nil || !strings.Contains(err.Error(), "schema") {
			t.Errorf("schema %q: got %v", name, err)
		}
	}
}

func TestErrorsDoNotShowThePassword(t *testing.T) {
	t.Parallel()
	for _, url := range []string{"postgres://u:s3cret@127.0.0.1:1/db", "postgres://u:s3cret@127.0.0.1:x/db"} {
		err := migrations.Up(testenv.Context(t), url, migrations.Config{})
		if err == nil || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%v", err)
		}
	}
}

// TestSchemaMatchesTheGoldenDump shows a reviewer the result of all migrations.
// Rewrite it with: go test ./migrations -run Golden -update
func TestSchemaMatchesTheGoldenDump(t *testing.T) {
	t.Parallel()
	db := testenv.Schema(t)
	out, err := exec.Command("pg_dump", "--schema-only", "--no-owner", "--no-privileges", "--schema="+db.Schema, db.URL).Output()
	if err != nil {
		t.Fatalf("pg_dump: %v", err)
	}
	dump := regexp.MustCompile(`(?m)^(--.*|SET .*|SELECT pg_catalog.set_config.*|\\(un)?restrict .*|CREATE SCHEMA .*)\n|^\n`).ReplaceAllString(string(out), "")
	dump = strings.ReplaceAll(dump, pgx.Identifier{db.Schema}.Sanitize(), "txbox")
	dump = strings.ReplaceAll(dump, db.Schema, "txbox")
	const golden = "testdata/schema.sql"
	if *update {
		if err := os.WriteFile(golden, []byte(dump), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if dump != string(want) {
		t.Errorf("the schema differs from %s; run the test with -update and read the difference", golden)
	}
}

func wantState(t *testing.T, db *testenv.DB, want migrations.State) {
	t.Helper()
	got, err := migrations.Status(testenv.Context(t), db.URL, migrations.Config{Schema: db.Schema})
	if err != nil || got != want {
		t.Fatalf("status: got %+v, %v, want %+v", got, err, want)
	}
}
