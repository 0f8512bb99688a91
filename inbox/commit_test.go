package inbox_test

import (
	"bytes"
	"context"
	"fmt"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/txbox/txbox/inbox"
	"github.com/txbox/txbox/internal/testenv"
)

// commits reports whether what a client sends has the effect of a message and a COMMIT.
func commits(sent []byte) bool {
	return bytes.Contains(sent, []byte("effects")) && bytes.Contains(sent, []byte("COMMIT"))
}

// The connection is lost before the server gets the COMMIT, or before its answer comes.
func TestACommitWithQueuedStatementsThatIsLostHasOneEffect(t *testing.T) {
	t.Parallel()
	for _, lost := range []string{"nothing", "request", "answer"} {
		t.Run(lost, func(t *testing.T) {
			t.Parallel()
			b := setupBroker(t)
			database := b.newDatabase(t)
			var sent, calls atomic.Int64
			database.onWrite = func(b []byte) (cut, swallow bool) {
				first := commits(b) && sent.Add(1) == 1
				return first && lost == "request", first && lost == "answer"
			}
			cfg := b.config(t)
			cfg.MaxAttempts = 1
			c := b.run(t, b.pool(t, database.url), testenv.AMQPURL(t), func(_ context.Context, tx pgx.Tx, m inbox.Message) error {
				calls.Add(1)
				b.pipeline(tx, m.ID)
				return nil
			}, cfg)
			b.publish(t, numbered(1)...)
			c.waitFor(t, "applied", func(s inbox.Stats) bool { return s.Applied == 1 })
			c.stop()
			b.want(t, "0", 1, 1)
			again := int64(1)
			if lost == "request" {
				again = 2
			}
			if s := c.Stats(); s.Failures != 0 || sent.Load() != 1 || calls.Load() != again {
				t.Errorf("%d calls, sent with COMMIT %d times, %+v", calls.Load(), sent.Load(), s)
			}
		})
	}
}

// Two messages break a constraint that is checked by COMMIT, so that nobody knows whose fault it is.
func TestACommitThatFailsParksNobodyElse(t *testing.T) {
	t.Parallel()
	for _, way := range []string{"tx", "pipeline"} {
		t.Run(way, func(t *testing.T) {
			t.Parallel()
			b := setupBroker(t)
			b.exec(t, "CREATE TABLE "+b.Table("late")+" (n integer UNIQUE DEFERRABLE INITIALLY DEFERRED)")
			cfg := b.config(t)
			cfg.MaxAttempts = 1
			insert := "INSERT INTO " + b.Table("late") + " VALUES ($1)"
			c := b.inOneBatch(t, b.Pool, cfg, func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
				n, err := strconv.Atoi(m.ID)
				if err != nil {
					return err
				}
				if n == 6 {
					n = 2
				}
				b.pipeline(tx, m.ID)
				if way == "tx" {
					_, err = tx.Exec(ctx, insert, n)
					return err
				}
				inbox.Pipeline(tx).Queue(insert, n)
				return nil
			}, numbered(8)...)
			c.waitFor(t, "settled", func(s inbox.Stats) bool { return s.Applied == 8 && s.Parked["dead"] == 1 })
			c.stop()
			if n := b.count(t, "effects", "true"); n != 7 {
				t.Errorf("%d effects", n)
			}
			if n := b.count(t, "inbox_parked", "last_error LIKE 'commit: %late_n_key%'"); n != 1 {
				t.Errorf("%d parked with the reason", n)
			}
		})
	}
}

// A queued statement takes longer than all may take.
func TestAQueuedStatementThatIsTooSlowFailsItsMessage(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	cfg := b.config(t)
	cfg.Timeout, cfg.MaxAttempts = time.Second, 1
	c := b.inOneBatch(t, b.Pool, cfg, func(_ context.Context, tx pgx.Tx, m inbox.Message) error {
		if m.ID == "1" {
			inbox.Pipeline(tx).Queue("SELECT pg_sleep(3600)")
		}
		b.pipeline(tx, m.ID)
		return nil
	}, numbered(3)...)
	c.waitFor(t, "settled", func(s inbox.Stats) bool { return s.Applied == 3 && s.Parked["dead"] == 1 })
	c.stop()
	for id, effects := range map[string]int{"0": 1, "1": 0, "2": 1} {
		b.want(t, id, 1, effects)
	}
	if n := b.count(t, "inbox_parked", "last_error LIKE 'not done after 1s: %'"); n != 1 {
		t.Errorf("%d parked with the reason", n)
	}
}

// slowCommit has each COMMIT take long that comes after insert.
func (e *env) slowCommit(t *testing.T, seconds int) (insert string) {
	t.Helper()
	e.exec(t, "CREATE TABLE "+e.Table("late")+" (n integer)")
	e.exec(t, fmt.Sprintf("CREATE FUNCTION %s() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(%d); RETURN NULL; END $$", e.Table("slow"), seconds))
	e.exec(t, "CREATE CONSTRAINT TRIGGER late AFTER INSERT ON "+e.Table("late")+
		" DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION "+e.Table("slow")+"()")
	return "INSERT INTO " + e.Table("late") + " VALUES (1)"
}

func TestACommitThatIsTooSlowFailsItsMessage(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	insert := b.slowCommit(t, 3600)
	cfg := b.config(t)
	cfg.Timeout, cfg.MaxAttempts = 2*time.Second, 1
	var calls atomic.Int64
	c := b.inOneBatch(t, b.Pool, cfg, func(_ context.Context, tx pgx.Tx, m inbox.Message) error {
		if m.ID == "1" {
			calls.Add(1)
			inbox.Pipeline(tx).Queue(insert)
		}
		b.pipeline(tx, m.ID)
		return nil
	}, numbered(3)...)
	c.waitFor(t, "settled", func(s inbox.Stats) bool { return s.Applied == 3 && s.Parked["dead"] == 1 })
	c.stop()
	for id, effects := range map[string]int{"0": 1, "1": 0, "2": 1} {
		b.want(t, id, 1, effects)
	}
	if n := b.count(t, "inbox_parked", "last_error LIKE 'COMMIT not done after 2s: %'"); n != 1 || calls.Load() > 12 { // twice for each of three transactions, and when others are in the way
		t.Errorf("%d parked with the reason, %d calls", n, calls.Load())
	}
}

// The connection is lost while the server commits, which it goes on with. Meanwhile the IDs
// are held by nobody who is there.
func TestWhatACommitOfUnknownOutcomeAppliedIsCounted(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	insert := b.slowCommit(t, 1)
	database := b.newDatabase(t)
	var sent atomic.Int64
	cancelRequest := []byte{0, 0, 0, 16, 4, 210, 22, 46}
	database.onWrite = func(written []byte) (cut, swallow bool) {
		if !commits(written) || sent.Add(1) > 1 {
			return bytes.HasPrefix(written, cancelRequest), false
		}
		time.AfterFunc(100*time.Millisecond, database.cut)
		return false, true
	}
	c := b.inOneBatch(t, b.pool(t, database.url), b.config(t), func(_ context.Context, tx pgx.Tx, m inbox.Message) error {
		if m.ID == "1" {
			inbox.Pipeline(tx).Queue(insert)
		}
		b.pipeline(tx, m.ID)
		return nil
	}, numbered(4)...)
	c.waitFor(t, "settled", func(s inbox.Stats) bool { return s.Applied+s.Duplicates == 5 })
	c.stop()
	if n := b.count(t, "effects", "true"); n != 4 {
		t.Errorf("%d effects", n)
	}
	if s := c.Stats(); s.Applied != 5 || sent.Load() != 1 {
		t.Errorf("sent with COMMIT %d times, %+v", sent.Load(), s)
	}
}

// COMMIT meets a lock each time, which is not waited for as for an ID: without end.
func TestACommitThatMeetsALockIsParked(t *testing.T) {
	t.Parallel()
	for _, way := range []string{"tx", "pipeline"} {
		t.Run(way, func(t *testing.T) {
			t.Parallel()
			b := setupBroker(t)
			b.exec(t, "CREATE TABLE "+b.Table("late")+" (n integer)")
			b.exec(t, "CREATE FUNCTION "+b.Table("locked")+"() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE SQLSTATE '55P03'; END $$")
			b.exec(t, "CREATE CONSTRAINT TRIGGER late AFTER INSERT ON "+b.Table("late")+
				" DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION "+b.Table("locked")+"()")
			cfg := b.config(t)
			cfg.MaxAttempts = 1
			insert := "INSERT INTO " + b.Table("late") + " VALUES (1)"
			c := b.run(t, b.Pool, testenv.AMQPURL(t), func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
				if way == "tx" {
					_, err := tx.Exec(ctx, insert)
					return err
				}
				inbox.Pipeline(tx).Queue(insert)
				return nil
			}, cfg)
			b.publish(t, numbered(1)...)
			c.waitFor(t, "dead", func(s inbox.Stats) bool { return s.Parked["dead"] == 1 })
			c.stop()
			b.want(t, "0", 1, 0)
		})
	}
}
