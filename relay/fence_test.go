package relay

import (
	"context"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/txbox/txbox/internal/testenv"
	"github.com/txbox/txbox/outbox"
)

// fenced is a schema with one message, the lane of which owner holds.
type fenced struct {
	*testing.T
	db    *testenv.DB
	sql   statements
	owner uuid.UUID
	epoch int64
	id    int64
	lane  int16
	msg   outbox.Message
}

func setupFence(t *testing.T) *fenced {
	t.Helper()
	f := &fenced{T: t, db: testenv.Schema(t), owner: uuid.New(), msg: outbox.Message{ID: outbox.NewID(), RoutingKey: "q"}}
	f.sql = newStatements(f.db.Schema)
	ctx := testenv.Context(t)
	f.must(pgx.BeginFunc(ctx, f.db, func(tx pgx.Tx) error {
		return outbox.Writer{Schema: f.db.Schema}.Write(ctx, tx, f.msg)
	}))
	f.must(f.db.QueryRow(ctx, "SELECT id, lane FROM "+f.db.Table("outbox")).Scan(&f.id, &f.lane))
	_, err := f.db.Exec(ctx, f.sql.lease, f.owner, "test", time.Minute, true)
	f.must(err)
	f.must(f.db.QueryRow(ctx, "SELECT epoch FROM "+f.db.Table("outbox_lane")+" WHERE lane = $1 AND owner = $2", f.lane, f.owner).Scan(&f.epoch))
	return f
}

func (f *fenced) must(err error) {
	f.Helper()
	if err != nil {
		f.Fatal(err)
	}
}

// park parks the message as the owner of an epoch, after so many attempts.
func (f *fenced) park(ctx context.Context, sql string, owner uuid.UUID, epoch int64, attempts int32, more ...any) error {
	args := append([]any{owner, []int16{f.lane}, []int64{epoch}, []int64{f.id}, []uuid.UUID{f.msg.ID},
		[]string{"retry"}, []int32{attempts}, []float64{60}, []string{"refused"}, lockWait}, more...)
	_, err := f.db.Exec(ctx, sql, args...)
	return err
}

func (f *fenced) parked() (n int) {
	f.Helper()
	f.must(f.db.QueryRow(testenv.Context(f), "SELECT count(*) FROM "+f.db.Table("outbox_parked")).Scan(&n))
	return n
}

func TestOnlyTheOwnerOfALaneParks(t *testing.T) {
	t.Parallel()
	f := setupFence(t)
	ctx := testenv.Context(t)
	f.must(f.park(ctx, f.sql.park, uuid.New(), f.epoch, 1))
	f.must(f.park(ctx, f.sql.park, f.owner, f.epoch-1, 1))
	f.must(f.park(ctx, f.sql.park, f.owner, f.epoch+1, 1))
	if f.parked() != 0 {
		t.Error("parked by somebody else")
	}
	f.must(f.park(ctx, f.sql.park, f.owner, f.epoch, 1))
	if f.parked() != 1 {
		t.Error("not parked by the owner")
	}
	attempts := func() (n int) {
		f.must(f.db.QueryRow(ctx, "SELECT attempts FROM "+f.db.Table("outbox_parked")).Scan(&n))
		return n
	}
	f.must(f.park(ctx, f.sql.repark, f.owner, f.epoch-1, 2, 3600.0))
	if attempts() != 1 {
		t.Error("an attempt was spent by somebody else")
	}
	for range 2 { // as when the answer to the first is lost
		f.must(f.park(ctx, f.sql.repark, f.owner, f.epoch, 2, 3600.0))
	}
	if attempts() != 2 {
		t.Error("an attempt of the owner was not spent, or twice")
	}
}

// The former owner's statement begins while a takeover is under way, and ends
// after it. It must do nothing: the new owner may be publishing the message.
func TestParkThatBeganBeforeATakeoverDoesNothing(t *testing.T) {
	t.Parallel()
	f := setupFence(t)
	ctx := testenv.Context(t)
	takeover, err := f.db.Begin(ctx)
	f.must(err)
	defer takeover.Rollback(ctx)
	_, err = takeover.Exec(ctx, "UPDATE "+f.db.Table("outbox_lane")+" SET owner = $2, epoch = epoch + 1 WHERE lane = $1", f.lane, uuid.New())
	f.must(err)
	result := make(chan error, 1)
	go func() { result <- f.park(ctx, f.sql.park, f.owner, f.epoch, 1) }()
	testenv.Eventually(t, 10*time.Second, "the park waits for the takeover", func() bool {
		var waiting bool
		f.must(f.db.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_stat_activity
			WHERE wait_event_type = 'Lock' AND position($1 in query) > 0 AND pid <> pg_backend_pid())`, f.db.Schema).Scan(&waiting))
		return waiting
	})
	f.must(takeover.Commit(ctx))
	f.must(<-result)
	if f.parked() != 0 {
		t.Error("a stale park went through")
	}
}
