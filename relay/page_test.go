package relay

import (
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/txbox/txbox/internal/servers/serverstest"
	"github.com/txbox/txbox/internal/testenv"
	"github.com/txbox/txbox/outbox"
)

// Rows can be seen before they are on disk. A page of them is used only when the log
// is there: a commit that merely draws a transaction id would not write it.
func TestPageIsOnDiskBeforeItIsUsed(t *testing.T) {
	t.Parallel()
	server := serverstest.Postgres(t)
	db := testenv.SchemaAt(t, server.URL())
	ctx := testenv.Context(t)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, statement := range []string{
		"ALTER SYSTEM SET wal_writer_delay = '10s'", "ALTER SYSTEM SET wal_writer_flush_after = '1GB'", "SELECT pg_reload_conf()",
	} {
		_, err := db.Exec(ctx, statement)
		must(err)
	}
	r := newRelay(t, db.Pool, db.Schema)
	must(r.leases.once(ctx, true))
	ids := r.reader.lanes()
	read := 0
	for i := range 30 {
		r.reader.loaded = i%2 == 0 // both ways of reading
		var pending bool
		must(pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, "SET LOCAL synchronous_commit = off"); err != nil {
				return err
			}
			return outbox.Writer{Schema: db.Schema}.Write(ctx, tx, outbox.Message{RoutingKey: "q"})
		}))
		must(db.QueryRow(ctx, "SELECT pg_current_wal_flush_lsn() < pg_current_wal_insert_lsn()").Scan(&pending))
		p, err := r.reader.readPage(ctx, ids)
		must(err)
		if len(p.messages) != i+1 {
			t.Fatalf("%d of %d messages read", len(p.messages), i+1)
		}
		var flushed bool
		must(db.QueryRow(ctx, "SELECT pg_current_wal_flush_lsn() >= $1::pg_lsn", p.position).Scan(&flushed))
		if !flushed {
			t.Errorf("read %d: used before it was on disk", i)
		}
		if pending {
			read++
		}
	}
	if read == 0 {
		t.Error("all was on disk at once, so this test shows nothing")
	}
}
