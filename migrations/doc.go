// Package migrations brings txbox's tables into a PostgreSQL database (13 or
// newer), in a schema of their own:
//
//	if err := migrations.Up(ctx, databaseURL, migrations.Config{}); err != nil {
//		return err
//	}
//
// One set of files serves producers, relays and consumers. Call Up at every
// start of a service, run "relay migrate up" in a deployment, or hand FS to a
// migration tool of your own. Files are applied in the order of their numbers,
// each in one transaction, and recorded in table txbox_migrations; table
// txbox_version says which programs the schema serves, whichever tool ran.
package migrations
